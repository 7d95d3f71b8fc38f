"""Command line: one module per verb of `hf-speechllm`."""
