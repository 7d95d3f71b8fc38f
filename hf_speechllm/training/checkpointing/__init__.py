"""Checkpoints of a run: writing, verification, resuming, selection, averaging."""
