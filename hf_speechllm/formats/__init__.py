"""Checkpoints: composition of new models, and reading and writing of checkpoint layouts."""
