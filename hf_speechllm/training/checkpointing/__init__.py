"""Checkpoints of a run: writing, verification, resuming, selection and averaging."""
