"""Training data: Kaldi lists and JSONL in, rows for the model out."""
