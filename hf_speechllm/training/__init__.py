"""Training: trainer, options, freezing, LoRA, data loaders, validation, faults of a run."""
