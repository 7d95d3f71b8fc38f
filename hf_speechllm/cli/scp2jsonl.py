"""Convert two Kaldi lists to a training JSONL: recordings (`ID PATH_OR_URL`) and transcripts (`ID TEXT`).

Joins the lists by ID, in the order of the recordings. If the transcripts have the IDs of a Kaldi `segments` file next
to --scp_file, rows are these parts of the recordings, cut when they are loaded. Checks every recording completely.
Reports bad lines and recordings with file and line, and writes no output if their share is above --max_bad_fraction.

    hf-speechllm scp2jsonl --scp_file data/wav.scp --transcript_file data/text --jsonl_file data/train.jsonl \\
        --model_name_or_path FunAudioLLM/Fun-ASR-Nano-2512-hf
"""

import argparse
import gc
import logging
import os
import sys
from contextlib import closing
from pathlib import Path

from ..console import progress_bar, show_log
from ..options import usable_cores
from .parser import Parser, refuse_input, require_writable

logger = logging.getLogger(__name__)


def fraction(text: str) -> float:
    """Parses a number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def add_row_options(parser: argparse.ArgumentParser, language: str, output: str) -> None:
    """Adds the options of the verbs that write rows: prompt, paths, bad rows.

    Args:
        parser: receives the options.
        language: help text of --language.
        output: what --relative paths are relative to.
    """
    parser.add_argument(
        "--model_name_or_path", help="model whose tokenizer computes text_length (default: no lengths)"
    )
    parser.add_argument("--language", help=language)
    parser.add_argument("--no_itn", action="store_true", help="prompt without inverse text normalisation")
    parser.add_argument("--prompt", help='replaces the default prompt, for example "Speech transcription:"')
    parser.add_argument(
        "--relative", action="store_true", help=f"write paths relative to {output}, not absolute paths"
    )
    parser.add_argument(
        "--audio_root", help="folder that must contain the recordings, after resolving links (default: any folder)"
    )
    parser.add_argument(
        "--max_bad_fraction", type=fraction, default=0.0, help="largest share of bad rows to leave out"
    )
    parser.add_argument("--bad_rows_file", help="file for a list of all bad rows")
    parser.add_argument(
        "--num_workers", type=int, default=max(8, usable_cores()), help="number of recordings to check at once"
    )


def parse_arguments() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--scp_file", required=True, help="recordings; paths may be relative to the folder of the list"
    )
    parser.add_argument("--transcript_file", required=True, help="transcripts, in any order")
    parser.add_argument("--jsonl_file", required=True, help="file to write")
    add_row_options(parser, "language in the prompt, as ISO code or Chinese name", "the JSONL")
    parser.add_argument("--overwrite", action="store_true", help="replace --jsonl_file if it exists")
    args = parser.parse_args()
    if args.num_workers < 1:
        parser.error("--num_workers must be at least 1")
    for flag in ("scp_file", "transcript_file"):
        if not os.path.isfile(getattr(args, flag)):
            parser.file_error(f"--{flag} {getattr(args, flag)}: no such file")
    refuse_input(parser, "--jsonl_file", args.jsonl_file, (args.scp_file, args.transcript_file))
    if os.path.exists(args.jsonl_file) and not args.overwrite:
        parser.file_error(f"--jsonl_file {args.jsonl_file} exists; choose another name, or use --overwrite")
    require_writable(parser, "--jsonl_file", args.jsonl_file)
    return args


def load_tokenizer(name: str):
    """Loads the tokenizer of a model folder or Hub id; FunASR models have a tokenizer folder (Qwen3-0.6B)."""
    from transformers import AutoTokenizer

    from ..model.configuration import SpeechLLMConfig  # noqa: F401 (transformers warns of unregistered configs)

    if Path(name, "config.yaml").is_file():
        inner = sorted(Path(name).glob("*/tokenizer_config.json"))
        name = str(inner[0].parent) if inner else name
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path {name}: the tokenizer cannot be loaded: {error}") from error


def make_rows(args: argparse.Namespace) -> None:
    """Writes the rows of the utterances that are in both lists."""
    from ..data.bad_rows import BadDataError, BadRows
    from ..data.kaldi import join, read_list, read_scp, read_segments, require_transcripts, warn_of_unused_segments
    from ..data.preparation import RowMaker, prepare
    from ..files import atomic_write
    from ..model import chat

    prompt = chat.transcription_prompt(args.language, not args.no_itn, prompt=args.prompt)
    chat.parse_messages(chat.transcription_messages("recording", prompt))
    tokenizer = load_tokenizer(args.model_name_or_path) if args.model_name_or_path else None
    if tokenizer is None:
        logger.info("no --model_name_or_path: text_length is left out of the rows")
    gc.freeze()  # excludes the loaded modules from garbage collection, which growing lists trigger often
    bad_rows = BadRows(args.max_bad_fraction, args.bad_rows_file)
    transcripts = read_list(args.transcript_file, bad_rows, "transcript")
    require_transcripts(transcripts)
    recordings = read_scp(args.scp_file, bad_rows, args.audio_root)
    segments = Path(args.scp_file).with_name("segments")
    if segments.is_file() and not {entry.id for entry in recordings.entries} & {
        entry.id for entry in transcripts.entries
    }:
        logger.info("%s cuts the recordings of %s", segments, args.scp_file)
        recordings = read_segments(segments, recordings, bad_rows)
    else:
        warn_of_unused_segments(recordings)
    utterances = join(recordings, transcripts, bad_rows)

    folder = os.path.realpath(os.path.dirname(os.path.abspath(args.jsonl_file))) if args.relative else None
    maker = RowMaker(prompt, tokenizer, folder)
    lines: list[str] = []
    durations: list[float] = []
    num_tokens = 0
    # `closing` ends the processes after any interruption.
    with (
        closing(prepare(utterances, maker, args.num_workers)) as parts,
        progress_bar(desc="checking", total=len(utterances), unit=" recordings") as progress,
    ):
        for part in parts:
            lines += part.lines
            durations += part.seconds
            num_tokens += part.num_tokens
            for bad_row in part.bad:
                bad_rows.add(*bad_row)
            progress.update(len(part.lines) + len(part.bad))
    bad_rows.check(total=len(lines) + len(bad_rows))
    if not lines:
        raise BadDataError(f"{args.scp_file}: no rows to write; see the list of bad rows")
    with atomic_write(args.jsonl_file) as file:
        file.writelines(lines)

    seconds = sum(durations)
    print(f"rows: {len(lines)}\nhours: {seconds / 3600:.3f}")
    print(f"seconds: mean {seconds / len(lines):.2f}, min {min(durations):.2f}, max {max(durations):.2f}")
    if tokenizer is not None:
        print(f"tokens: {num_tokens}")
    kinds = ", ".join(f"{kind} {count}" for kind, count in bad_rows.kinds().most_common())
    print(f"bad rows: {len(bad_rows)}" + (f" ({kinds})" if kinds else ""))


def main() -> None:
    """Runs the command; see the docstring of the module."""
    show_log()
    arguments = parse_arguments()
    try:
        make_rows(arguments)
    except (OSError, ValueError) as error:  # bad data, unknown language or model, full disk
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"interrupted; {arguments.jsonl_file} is unchanged", file=sys.stderr)
        sys.exit(130)
