"""Transcribe recordings with a speech LLM: `ID<tab>text` lines, in the order of the input.

hf-speechllm decode --model_name_or_path exp/model --output_file exp/hyp.txt a.wav b.mp3 folder/ c.tar d.parquet
hf-speechllm decode --model_name_or_path exp/model --output_file exp/hyp.txt --scp_file data/test/wav.scp
hf-speechllm decode --num_processes 8 ...  (8 processes with one GPU each share the list)

Run the same command again to resume an interrupted run, or to decode failed recordings again. A second run for the
same output file is refused while the first runs.
Exit status: 0 if all recordings were decoded; 1 if recordings failed (listed; the output has the others), or after an
error; 2 for wrong usage.
"""

import argparse
import contextlib
import glob
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..console import command, format_seconds, print_summary, quiet_transformers, show_log
from ..options import usable_cores
from .launch import add_launch_options, launch, split_launch_options
from .parser import Parser, command_line, prog, refuse_input

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses and checks the command line, and creates the folder of the output."""
    parser = Parser(__doc__)
    add_recordings_and_prompt(parser)
    add_search(parser)
    add_launch_options(parser)
    args = parser.parse_args(argv)
    check_options(parser, args)
    check_files(parser, args)
    return args


def add_recordings_and_prompt(parser: Parser) -> None:
    """Adds the options of the recordings and the prompt."""
    parser.add_argument("--model_name_or_path", required=True, help="model or LoRA folder, or Hub id")
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="recordings, URLs, folders, .tar, .parquet files")
    parser.add_argument("--scp_file", help="Kaldi list: ID and path or URL")
    parser.add_argument("--segments_file", help="Kaldi list: ID, recording of --scp_file, start and end in seconds")
    parser.add_argument(
        "--jsonl_file", help="training rows with prompts; IDs: key of the rows, otherwise the stems of the file names"
    )
    parser.add_argument("--output_file", required=True, help="file for the texts")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace --output_file, or results of an unfinished run"
    )
    parser.add_argument(
        "--language",
        help="language of the texts: zh, en, ja, ..., Chinese, English, Japanese, ... or 中文, 英文, 日文, ...",
    )
    parser.add_argument("--no_itn", action="store_true", help="write numbers as spoken words")
    parser.add_argument("--hotwords", help="comma-separated hotwords, or a file with one hotword per line")
    parser.add_argument("--context", help="topic of the recordings, in one or two sentences")
    parser.add_argument("--prompt", help="instruction that replaces --language and --no_itn")


def add_search(parser: Parser) -> None:
    """Adds the options of the search, the CTC head and the output."""
    parser.add_argument("--max_new_tokens", type=int, default=512, help="length of a text (of a segment), at most")
    parser.add_argument(
        "--batch_seconds",
        type=float,
        help="padded audio seconds per batch (default: 240; on a GPU as its memory allows, up to 8192)",
    )
    parser.add_argument("--num_beams", type=int, default=1, help="number of beams; 1: greedy search")
    parser.add_argument(
        "--repetition_guard", action="store_true", help="stop, cut and report loops at the end of texts"
    )
    parser.add_argument("--vad", action="store_true", help="detect speech, decode segments, write their times")
    parser.add_argument(
        "--word_times", action="store_true", help="write start, end and confidence of words; requires a CTC head"
    )
    parser.add_argument(
        "--ctc_guard", action="store_true", help="replace texts that the CTC head contradicts by the CTC head's own"
    )
    parser.add_argument("--confidence_file", help="confidence.json of score --words: calibrates confidence")
    parser.add_argument(
        "--ctc_draft",
        action="store_true",
        help="let the LLM verify drafts of the CTC head: fewer steps, equal texts",
    )
    parser.add_argument(
        "--ctc_draft_threshold",
        type=float,
        metavar="P",
        help="with --ctc_draft: take drafts with a probability of at least P without the LLM",
    )
    parser.add_argument(
        "--ctc_weight",
        type=float,
        default=0.0,
        metavar="W",
        help="with --num_beams: weight of the CTC head (0 <= W < 1) in the choice among the hypotheses (default: 0)",
    )
    parser.add_argument("--vad_max_seconds", type=float, default=30.0, help="duration of a segment, at most")
    parser.add_argument("--num_workers", type=int, default=min(8, usable_cores()), help="threads that load audio")
    parser.add_argument("--no_cuda_graphs", action="store_true", help="has no effect; deprecated")
    parser.add_argument(
        "--fast",
        choices=["auto", "off"],
        default="auto",
        help="off: plain paths of torch and transformers, slower and with the same texts",
    )
    parser.add_argument("--device", help="device (default: GPU of this process, otherwise the CPU)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="dtype (default: bfloat16 on a GPU, otherwise float32)"
    )


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    """Refuses options that contradict each other, and values out of range."""
    if sum(map(bool, (args.sources, args.scp_file, args.jsonl_file))) != 1:
        parser.error("pass exactly one of: recordings (or folders, ...), --scp_file, --jsonl_file")
    if args.segments_file and not args.scp_file:
        parser.error("--segments_file requires --scp_file")
    if args.confidence_file and not args.word_times:
        parser.error("--confidence_file requires --word_times")
    if args.ctc_draft and (args.num_beams > 1 or args.repetition_guard or args.ctc_weight):
        parser.error(
            "--ctc_draft is not supported with --num_beams, --ctc_weight and --repetition_guard; leave these out"
        )
    if not 0 <= args.ctc_weight < 1:
        parser.error("--ctc_weight must be at least 0 and below 1")
    if args.ctc_weight and args.num_beams == 1:
        parser.error("--ctc_weight requires --num_beams above 1")
    if args.ctc_draft_threshold is not None:
        if not args.ctc_draft:
            parser.error("--ctc_draft_threshold requires --ctc_draft")
        if not 0 < args.ctc_draft_threshold <= 1:
            parser.error("--ctc_draft_threshold must be above 0 and at most 1")
    for name in ("max_new_tokens", "batch_seconds", "num_beams", "vad_max_seconds", "num_workers"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} must be above 0")


def check_files(parser: Parser, args: argparse.Namespace) -> None:
    """Refuses missing lists and existing outputs, and creates the folder of the output."""
    for file in filter(None, (args.scp_file, args.segments_file, args.jsonl_file, args.confidence_file)):
        if not Path(file).is_file():
            parser.file_error(f"{file}: {'not a file' if Path(file).exists() else 'no such file'}")
    if args.scp_file:
        with open(args.scp_file, "rb") as file:
            if file.read(1) == b"{":
                parser.file_error(
                    f"--scp_file {args.scp_file}: JSON instead of lines `ID PATH_OR_URL`; use --jsonl_file"
                )
    output = Path(args.output_file).resolve()
    inputs = (args.scp_file, args.segments_file, args.jsonl_file, *args.sources)
    refuse_input(parser, "--output_file", args.output_file, inputs)
    unfinished = any(output.parent.glob(f"{glob.escape(output.name)}.partial-*.jsonl"))
    if output.exists() and not args.overwrite and not unfinished:
        parser.file_error(f"{args.output_file} exists; remove the file, or replace it with --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.file_error(
            f"--output_file {args.output_file}: {output.parent} cannot be created: {error.strerror}; choose another "
            "folder"
        )


def main() -> None:
    """Runs the command; see the docstring of the module."""
    launch_options, argv = split_launch_options(command_line()[1])
    args = parse_arguments(argv)
    if launch_options:
        try:
            return launch("decode", launch_options, argv)
        except ValueError as error:
            sys.exit(f"{prog()}: error: {error}")
    show_log()
    quiet_transformers()

    from ..data.bad_rows import BadRows
    from ..inference.decoding import decode_requests, lock_output
    from ..inference.distributed import Processes
    from ..inference.journal import Journal
    from ..inference.writers import write_failures, write_record, write_results
    from .decoding import option_settings, prepare, read_requests, run_record

    bad_rows = BadRows(max_bad_fraction=1.0)
    with Processes() as processes, contextlib.ExitStack() as stack:
        journal = Journal(os.path.realpath(args.output_file), option_settings(args), processes.rank)
        try:
            stack.enter_context(lock_output(args.output_file, journal, processes, args.overwrite))
            plan, transcriber = prepare(args, read_requests(args, bad_rows, processes), journal, processes)
        except (OSError, ValueError) as error:
            sys.exit(f"{prog()}: error: {error}" if processes.rank == 0 else 1)
        try:
            outcome = decode_requests(transcriber, plan, journal, processes)
            if processes.rank > 0:
                return
            failures = [*map(str, bad_rows), *outcome.failures]
            uses_ctc = args.word_times or args.ctc_guard
            written: list[str] = []
            if transcriber is not None and outcome.results:
                written = write_results(
                    args.output_file, outcome.results, args.vad or args.repetition_guard or uses_ctc,
                    subtitles=args.vad or args.word_times, words=args.word_times, checked=uses_ctc,
                )  # fmt: skip
                write_record(
                    args.output_file, run_record(args, journal, transcriber, outcome, len(failures), processes)
                )
            named = write_failures(args.output_file, failures)
        except OSError as error:
            sys.exit(f"{prog()}: error: {error}; results are kept; correct the error and start again")
        except KeyboardInterrupt:
            raise KeyboardInterrupt("; results are kept; run the same command again to resume") from None
        texts = f"{len(outcome.results)}, {len(failures)} failed"
        if args.repetition_guard:
            texts += f", {sum(transcript.looped for _, transcript in outcome.results)} loops cut"
        audio = f"{format_seconds(outcome.seconds)} in {format_seconds(outcome.elapsed)}"
        facts = {
            "texts": texts,
            "audio": f"{audio} (RTFx {outcome.seconds / outcome.elapsed:.0f})",
            "written": written,
        }
        reference = args.jsonl_file or "REFERENCE"
        folder = f"{args.output_file}.score"
        score = command("score", reference, args.output_file, output_dir=folder, scp_file=args.scp_file)
        print_summary(facts, [] if failures else [score])
        if failures:
            hint = f"Correct these and start again; other results are kept in {journal.prefix}*.jsonl"
            sys.exit(f"{prog()}: {len(failures)} failed:\n{named}\n{hint}")
        journal.remove()
