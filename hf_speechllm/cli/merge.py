"""Merge the adapters of a LoRA run into the base model, so that the model loads without peft.

hf-speechllm merge --input exp/lora --output exp/lora_merged
"""

import sys
from pathlib import Path

from ..console import command, print_summary, quiet_transformers, show_log
from .parser import Parser, prog


def main() -> None:
    """Runs the command; see the docstring of the module."""
    parser = Parser(__doc__)
    parser.add_argument("--input", required=True, help="output folder or checkpoint of a LoRA run")
    parser.add_argument("--output", required=True, help="folder for the merged model; must not exist")
    args = parser.parse_args()
    if Path(args.output).exists():
        parser.file_error(f"{args.output} exists; remove it or choose another --output")

    show_log()
    quiet_transformers()

    from .. import SpeechLLMProcessor
    from ..formats.loading import ADAPTER, PARTIAL, find_layout, read_checkpoint
    from ..formats.saving import write_checkpoint

    try:
        if find_layout(args.input) not in (ADAPTER, PARTIAL):
            raise ValueError(f"{args.input}: no LoRA adapters to merge; give the output folder of a LoRA run")
        checkpoint = read_checkpoint(args.input)  # merges adapters
        write_checkpoint(checkpoint, SpeechLLMProcessor.from_pretrained(args.input), args.output, "speech_llm")
    except (OSError, ValueError) as error:
        sys.exit(f"{prog()}: error: {error}")
    recording = command("decode", "RECORDING", model_name_or_path=args.output, output_file="texts.txt")
    print_summary({"merged": args.output}, [recording])
