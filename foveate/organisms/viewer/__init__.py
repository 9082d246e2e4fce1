"""`viewer`: a small window transformer that finds, names and counts digits in scenes."""
