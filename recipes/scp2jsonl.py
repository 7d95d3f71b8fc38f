"""Runs `hf-speechllm scp2jsonl`. Options: --help."""

from hf_speechllm_command import main

if __name__ == "__main__":
    main("scp2jsonl")
