"""Runs `hf-speechllm compose`. Options: --help."""

from hf_speechllm_command import main

if __name__ == "__main__":
    main("compose")
