"""Checkpoints: composing new models, and the layouts that models come and go in."""
