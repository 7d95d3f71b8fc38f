"""Checks before GPU time is spent: faults in the data, and the plan of a run."""
