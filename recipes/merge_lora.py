"""Merge the adapters of a LoRA run into the model, so that it loads without peft.

python recipes/merge_lora.py --input exp/lora --output exp/lora_merged
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="output folder or checkpoint of a LoRA run")
    parser.add_argument("--output", required=True, help="where the merged model goes; must not exist")
    args = parser.parse_args()
    if Path(args.output).exists():
        parser.error(f"{args.output} exists; remove it or choose another --output")

    from hf_speechllm import SpeechLLMProcessor
    from hf_speechllm.formats.loading import read_checkpoint, write_checkpoint

    try:
        checkpoint = read_checkpoint(args.input)  # merges what it reads from a LoRA folder
        write_checkpoint(checkpoint, SpeechLLMProcessor.from_pretrained(args.input), args.output, "speech_llm")
    except (OSError, ValueError) as error:
        sys.exit(f"merge_lora.py: error: {error}")
    print(f"{args.output}: merged")


if __name__ == "__main__":
    main()
