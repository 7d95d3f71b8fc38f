"""The same as `hf-speechllm scp2jsonl`; its options: --help."""

from hf_speechllm_command import main

if __name__ == "__main__":
    main("scp2jsonl")
