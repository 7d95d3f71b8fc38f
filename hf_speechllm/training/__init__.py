"""Training: arguments, freezing, LoRA, the trainer and its callbacks."""
