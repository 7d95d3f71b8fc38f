"""Publish the model of a finished training run on the Hub; new repositories are private without --public.

hf-speechllm push --input exp/lora --hub_model_id YOU/MODEL

Training with --push_to_hub does the same at the end. Log in with `hf auth login`, or set HF_TOKEN. After an error, run
the same command again.
"""

import sys
from pathlib import Path

from ..console import command, print_summary, show_log
from .parser import Parser, prog


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--input", required=True, help="output folder of hf-speechllm finetune")
    parser.add_argument("--hub_model_id", required=True, help="USER/MODEL; created if missing")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    args = parser.parse_args()
    if not Path(args.input).is_dir():
        parser.error(f"--input {args.input}: no such folder; name the output folder of a training run")
    show_log()

    from ..hub.publishing import publish

    try:
        commit = publish(args.input, args.hub_model_id, private=not args.public, revision=args.revision)
    except (OSError, ValueError, RuntimeError) as error:  # the Hub client raises RuntimeError for a failed upload
        sys.exit(f"{prog()}: error: {error}")
    recording = command("decode", "RECORDING", model_name_or_path=args.hub_model_id, output_file="texts.txt")
    print_summary({"published": str(commit.repo_url)}, [recording])
