"""Runs `hf-speechllm convert`. Options: --help."""

from hf_speechllm_command import main

if __name__ == "__main__":
    main("convert")
