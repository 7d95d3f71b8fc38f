"""Convert a corpus in any known layout to training JSONL: train.jsonl, dev.jsonl, test.jsonl and summary.json.

hf-speechllm prepare data/train --output_dir data/jsonl                    (Kaldi: wav.scp, text, segments, utt2spk)
hf-speechllm prepare cv-corpus-21.0/de --output_dir data/de                (Common Voice, with its splits)
hf-speechllm prepare calls.csv --output_dir data/calls --columns text=said --split 0.8 0.1 0.1
hf-speechllm prepare google/fleurs --config de_de --output_dir data/fleurs (a data set of the Hub)

SOURCE is a file, a folder, or the id of a data set on the Hub; the format is detected. Uses the splits of the source,
or draws splits: by speaker if there are enough, and never with one recording in two splits. Recordings are not
copied, except recordings of `datasets` without files; parts of long recordings are cut on loading. Checks every
recording completely, and writes no output if the share of bad rows is above --max_bad_fraction.
"""

import argparse
import contextlib
import logging
import os
import sys
from typing import Any

from ..console import command, print_summary, progress_bar, show_log
from .parser import Parser, prog, refuse_input
from .scp2jsonl import add_row_options, fraction, load_tokenizer

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = [0.9, 0.05, 0.05]
ROUNDING = 0.002  # tolerance of the sum of the shares, for thirds


def parse_arguments() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="file, folder or Hub id")
    parser.add_argument("--output_dir", required=True, help="output folder")
    parser.add_argument("--format", help="format of SOURCE (default: detected); an unknown format lists all formats")
    parser.add_argument(
        "--split",
        nargs=3,
        type=fraction,
        metavar=("TRAIN", "DEV", "TEST"),
        help="shares of drawn splits (default: splits of the source, otherwise 0.9 0.05 0.05)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of drawn splits")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="ROLE=NAME",
        help="columns not found by name; roles: audio, text, speaker, language, start, end, duration, id, split",
    )
    parser.add_argument("--subset", help="training subset of WenetSpeech or GigaSpeech, for example S")
    parser.add_argument("--config", help="configuration of a data set on the Hub")
    parser.add_argument("--hub_split", help="split of a data set on the Hub (default: all)")
    parser.add_argument("--streaming", action="store_true", help="read a data set of the Hub without a cached copy")
    add_row_options(
        parser, "language in prompts, as ISO code or Chinese name; source: the language of each row", "--output_dir"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output of an earlier run")
    args = parser.parse_args()
    args.columns = dict(item.partition("=")[::2] for item in args.columns)
    if not all(args.columns.values()):
        parser.error("--columns: write ROLE=NAME, for example text=sentence")
    if args.num_workers < 1:
        parser.error("--num_workers must be at least 1")
    if args.split is not None and abs(sum(args.split) - 1) > ROUNDING:
        parser.error(
            f"--split {' '.join(f'{share:g}' for share in args.split)}: the sum of the shares is {sum(args.split):g}; "
            "it must be 1"
        )
    for path in output_files(args):
        # The lists of a folder with these files are the source.
        beside = os.path.join(args.source, os.path.basename(path))
        refuse_input(parser, "--output_dir", path, (args.source, beside))
    if message := existing_output(args):
        parser.file_error(message)
    return args


def output_files(args: argparse.Namespace) -> list[str]:
    """Returns the paths of the JSONL that may be written."""
    return [os.path.join(args.output_dir, f"{split}.jsonl") for split in ("train", "dev", "test")]


def existing_output(args: argparse.Namespace) -> str | None:
    """Returns an error if an output exists that must not be replaced."""
    found = None if args.overwrite else next(filter(os.path.exists, output_files(args)), None)
    return found and f"{found} exists; choose another --output_dir, or use --overwrite"


def prepare_source(args: argparse.Namespace) -> None:
    """Reads the source, writes rows and summary, and prints the summary.

    Raises:
        OSError, ValueError: if the source or an option is not usable, or a file cannot be written.
    """
    from ..data.bad_rows import BadDataError, BadRows
    from ..data.corpus import (
        SUMMARY_FILE,
        choose_splits,
        name_utterances,
        read_utterances,
        warn_of_shared_recordings,
        write_corpus,
        write_summary,
    )
    from ..data.preparation import RowMaker
    from ..data.sources import SOURCES, read_source, recognize
    from ..data.sources.reading import Reading, TarWriter
    from ..data.sources.tables import ROLES
    from ..data.utterance import SPLITS
    from ..locks import output_file_lock
    from ..model import chat

    if args.format is not None and args.format not in SOURCES:
        raise BadDataError(f"--format {args.format}: unknown format; choose one of {', '.join(SOURCES)}")
    if unknown := [role for role in args.columns if role not in ROLES]:
        raise BadDataError(f"--columns {unknown[0]}=...: unknown role; choose one of {', '.join(ROLES)}")
    own_language = args.language == "source"
    prompt = chat.transcription_prompt(None if own_language else args.language, not args.no_itn, prompt=args.prompt)
    chat.parse_messages(chat.transcription_messages("recording", prompt))
    tokenizer = load_tokenizer(args.model_name_or_path) if args.model_name_or_path else None
    format = args.format or recognize(args.source)
    if format is not None:
        logger.info("%s: %s", args.source, format)
    os.makedirs(args.output_dir, exist_ok=True)
    bad_rows = BadRows(args.max_bad_fraction, args.bad_rows_file)
    summary_file = os.path.join(args.output_dir, SUMMARY_FILE)
    with output_file_lock(summary_file, args.output_dir, "--output_dir"), TarWriter(args.output_dir) as tar:
        if message := existing_output(args):  # of a run that has ended meanwhile
            raise FileExistsError(message)
        reading = Reading(bad_rows, args.columns, args.subset, args.config, args.hub_split, args.streaming, tar)
        found = progress_bar(read_source(args.source, reading, format), desc="reading", unit=" rows")
        utterances = name_utterances(read_utterances(found, bad_rows, args.audio_root))
        tar.finish()
        warn_of_shared_recordings(utterances)
        languages = {item.language for item in utterances if item.language is not None} if own_language else set()
        prompts = {language: chat.transcription_prompt(language, not args.no_itn) for language in languages}
        splits, chosen = choose_splits(utterances, args.split, DEFAULT_SPLIT, args.seed)
        folder = os.path.realpath(args.output_dir) if args.relative else None
        maker = RowMaker(prompt, tokenizer, folder, prompts, origin=True)
        with progress_bar(desc="checking", total=len(utterances), unit=" rows") as progress:
            counts = write_corpus(
                utterances, splits, maker, args.output_dir, bad_rows, args.num_workers, progress.update
            )
        for split, share in zip(SPLITS, args.split or DEFAULT_SPLIT, strict=True):
            if chosen.startswith("drawn") and share and not counts["splits"][split]["rows"]:
                logger.warning(
                    "%s is empty: the source has too few recordings, and each is in one split only; "
                    "choose other shares with --split (0 for a split without rows)",
                    split,
                )
        summary = {
            "source": args.source, "format": format, "split": chosen, **counts, "left_out": dict(reading.left_out),
        }  # fmt: skip
        write_summary(summary, args.output_dir)
    files = [path for path in output_files(args) if os.path.exists(path)]
    print_summary({**_facts(summary), "written": files}, [command("doctor", args.output_dir)])


def _facts(summary: dict[str, Any]) -> dict[str, str]:
    """Returns the entries of a summary as text."""
    facts = {}
    for name, values in summary.items():
        if name == "splits":
            for split, numbers in values.items():
                shown = ((unit, number) for unit, number in numbers.items() if number or unit != "speakers")
                facts[split] = ", ".join(f"{number} {unit}" for unit, number in shown)
        elif values not in ({}, None):
            listed = (
                (f"{key} {count}" for key, count in values.items()) if isinstance(values, dict) else (str(values),)
            )
            facts[name.replace("_", " ")] = ", ".join(listed)
    return facts


def main() -> None:
    """Runs the command; see the docstring of the module."""
    show_log()
    arguments = parse_arguments()
    existed = os.path.exists(arguments.output_dir)
    try:
        prepare_source(arguments)
    except (OSError, ValueError) as error:  # bad data, unknown language or model, full disk
        sys.exit(f"{prog()}: error: {error}")
    except KeyboardInterrupt:
        print(f"{prog()}: interrupted; no JSONL was written", file=sys.stderr)
        sys.exit(130)
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # a folder with files stays
                os.rmdir(arguments.output_dir)
