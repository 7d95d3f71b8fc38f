"""Entry point of `python -m hf_speechllm VERB`, the same as `hf-speechllm VERB`."""

from .cli.main import main

if __name__ == "__main__":
    main()
