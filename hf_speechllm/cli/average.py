"""Average checkpoints of a training run, full models or LoRA adapters.

hf-speechllm average \\
    --inputs exp/model/checkpoint-800 exp/model/checkpoint-900 exp/model/checkpoint-1000 --output exp/averaged
"""

import sys

from ..console import command, print_summary, quiet_transformers, show_log
from .parser import Parser, prog


def main() -> None:
    """Runs the command; see the docstring of the module."""
    parser = Parser(__doc__)
    parser.add_argument("--inputs", nargs="+", required=True, help="at least two checkpoint folders")
    parser.add_argument(
        "--output", required=True, help="new folder, with configuration and processor of the last input"
    )
    parser.add_argument(
        "--exact_lora",
        action="store_true",
        help="LoRA: compute the exact mean of the updates B A, which multiplies the rank by the number of inputs "
        "(default: average the matrices, for checkpoints of one run)",
    )
    args = parser.parse_args()

    show_log()
    quiet_transformers()

    from ..training.checkpointing.averaging import average_checkpoints

    try:
        average_checkpoints(args.inputs, args.output, args.exact_lora)
    except (OSError, ValueError) as error:
        sys.exit(f"{prog()}: error: {error}")
    recording = command("decode", "RECORDING", model_name_or_path=args.output, output_file="texts.txt")
    print_summary({"written": f"{args.output}: mean of {len(args.inputs)} checkpoints"}, [recording])
