"""The same as `hf-speechllm push`; its options: --help."""

from hf_speechllm_command import main

if __name__ == "__main__":
    main("push")
