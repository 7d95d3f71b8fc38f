"""Runs `hf-speechllm synthesize`. Options: --help."""

from hf_speechllm_command import main

if __name__ == "__main__":
    main("synthesize")
