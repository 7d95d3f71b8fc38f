"""Publish the model of a finished training run; private unless told otherwise.

python recipes/push_to_hub.py --input exp/lora --hub_model_id YOU/MODEL

Training does the same at its end with --push_to_hub. Log in before with `hf auth login`, or set HF_TOKEN. A push that
broke off is repeated with the same command.
"""

import argparse
import logging
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="output folder of finetune.py")
    parser.add_argument("--hub_model_id", required=True, help="USER/MODEL; created if it is not there")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    args = parser.parse_args()
    if not Path(args.input).is_dir():
        parser.error(f"--input: {args.input} is not a folder")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from hf_speechllm.hub.publishing import publish

    try:
        commit = publish(args.input, args.hub_model_id, private=not args.public, revision=args.revision)
    except (OSError, ValueError, RuntimeError) as error:  # the client's own, for an upload that failed
        sys.exit(f"push_to_hub.py: error: {error}")
    print(commit.repo_url)


if __name__ == "__main__":
    main()
