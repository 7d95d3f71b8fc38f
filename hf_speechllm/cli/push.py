"""Publish the model of a finished training run on the Hub; new repositories are private without --public.

hf-speechllm push --input exp/lora --hub_model_id YOU/MODEL --license apache-2.0 --score test=exp/score

--score adds measured error rates to the model card, in the forms that the Hub reads. Figures are refused if their
files are missing or have changed, or if the texts come from another model. Training with --push_to_hub publishes the
model without these. Log in with `hf auth login`, or set HF_TOKEN. After an error, run the same command again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import command, print_summary, show_log
from .parser import Parser, prog

if TYPE_CHECKING:
    from ..hub.results import Result

logger = logging.getLogger(__name__)


def main() -> None:
    """Runs the command; see the docstring of the module."""
    parser = Parser(__doc__)
    parser.add_argument("--input", required=True, help="output folder of hf-speechllm finetune")
    parser.add_argument("--hub_model_id", required=True, help="USER/MODEL; created if missing")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument(
        "--score",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="folders of hf-speechllm score; NAME of a data set on the Hub: ORG/NAME[:CONFIG[:SPLIT]]",
    )
    parser.add_argument("--language", nargs="+", default=[], help="ISO codes (default: languages of --score)")
    parser.add_argument("--license", help="SPDX id of the licence, for example apache-2.0")
    parser.add_argument("--datasets", nargs="+", default=[], help="Hub ids of the training data")
    args = parser.parse_args()
    if not Path(args.input).is_dir():
        parser.file_error(f"--input {args.input}: no such folder; name the output folder of a training run")
    show_log()

    from ..hub.publishing import CardOptions, publish
    from ..hub.results import read_results

    try:
        results = read_results(args.score)
        check_models(args.input, results)
        options = CardOptions(results, args.language, args.license, args.datasets)
        commit = publish(
            args.input, args.hub_model_id, private=not args.public, revision=args.revision, options=options
        )
    except (OSError, ValueError, RuntimeError) as error:  # the Hub client raises RuntimeError for a failed upload
        sys.exit(f"{prog()}: error: {error}")
    recording = command("decode", "RECORDING", model_name_or_path=args.hub_model_id, output_file="texts.txt")
    print_summary({"published": str(commit.repo_url)}, [recording])


def check_models(folder: str, results: Sequence[Result]) -> None:
    """Checks that scored texts come from the model in a folder; warns about texts of unknown models.

    Args:
        folder: of the model.
        results: see `hub.results.Result`.

    Raises:
        ValueError: if texts come from another model.
    """
    import torch

    from ..hub.results import check_model
    from ..inference.stamp import model_fingerprint
    from ..model.modeling import SpeechLLMForConditionalGeneration
    from ..model.processing import SpeechLLMProcessor

    by_dtype: dict[str, list[Result]] = {}
    for result in results:
        if result.record is None:
            logger.warning(
                "%s: no record of hf-speechllm decode says which model made the texts; the card reports this",
                result.path,
            )
        else:
            by_dtype.setdefault(result.record["settings"]["dtype"], []).append(result)
    for dtype, part in by_dtype.items():
        model = SpeechLLMForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
        fingerprint = model_fingerprint(model, SpeechLLMProcessor.from_pretrained(folder))
        for result in part:
            check_model(result, fingerprint)
