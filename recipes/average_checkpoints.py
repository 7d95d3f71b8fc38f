"""Average checkpoints of a training run, full models or LoRA adapters.

python recipes/average_checkpoints.py \
    --inputs exp/model/checkpoint-800 exp/model/checkpoint-900 exp/model/checkpoint-1000 --output exp/averaged
"""

import argparse
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", nargs="+", required=True, help="Two folders or more.")
    parser.add_argument("--output", required=True, help="New folder; gets config and processor of the last input.")
    parser.add_argument(
        "--exact_lora",
        action="store_true",
        help="LoRA: average the updates B A, which multiplies the rank by the number of inputs; by default the "
        "matrices are averaged, which suits checkpoints of one run.",
    )
    args = parser.parse_args()

    from hf_speechllm.training.checkpointing.averaging import average_checkpoints

    try:
        average_checkpoints(args.inputs, args.output, args.exact_lora)
    except (OSError, ValueError) as error:
        sys.exit(f"average_checkpoints.py: error: {error}")
    print(f"mean of {len(args.inputs)} checkpoints: {args.output}")


if __name__ == "__main__":
    main()
