"""The common suite: what every mechanism must satisfy, decided by its interface and its tags."""
