"""Measuring what restricting attention costs: tasks, paired timings, `compare` and its report.

Nothing is imported here, so that ``import foveate.bench`` stays quick; import the module that is needed:
``machine`` (environment columns), ``mechanisms`` (names -> policies at one density), ``tasks`` (bits per
byte, needle recall), ``compare`` (the run itself), ``report`` (table, HTML page, picture).
"""
