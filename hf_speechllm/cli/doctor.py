"""Check recordings and transcripts for faults before GPU time is spent.

hf-speechllm doctor data/                        (a folder of `prepare`: train.jsonl, dev.jsonl, test.jsonl)
hf-speechllm doctor data/train data/test --html report.html                (Kaldi folders, or any source of `prepare`)
hf-speechllm doctor train=a.jsonl test=b.jsonl --model exp/model --json findings.json --fix clean.jsonl

DATA is what `prepare` and `--train_file` read. The name of a file or folder tells its split (train, dev, test), or
SPLIT=PATH does; names without a split are training data. With --model, also checks tokens, text_length and the model's
loss: a row with an unusually high loss probably has a wrong transcript. --list_kinds prints all kinds with thresholds.

Exit status: 0 without errors, 1 if there are errors (with --strict also warnings), 2 if the command cannot run.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .parser import Parser, did_you_mean, prog, refuse_input, show_log

if TYPE_CHECKING:
    from ..diagnosis.doctor import Diagnosis

logger = logging.getLogger(__name__)

EXAMPLE_WIDTH = 110  # characters of the detail in the console table
COLOURS = {"error": "\033[31m", "warning": "\033[33m", "note": "\033[36m"}


def parse_arguments() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = Parser(__doc__)
    parser.add_argument("data", metavar="DATA", nargs="*", help="files, folders or globs; SPLIT=PATH names the split")
    parser.add_argument("--model_name_or_path", "--model", help="model for checks of tokens and loss")
    parser.add_argument("--json", metavar="FILE", help="write findings: row ID, file, line, kind, detail")
    parser.add_argument("--html", metavar="FILE", help="write a page with histograms and players")
    parser.add_argument("--fix", metavar="OUT", help="write the rows without findings, and OUT.dropped.tsv")
    parser.add_argument(
        "--drop", choices=("error", "warning"), default="warning", help="mildest findings for which --fix drops a row"
    )
    parser.add_argument("--ignore", nargs="+", default=[], metavar="KIND", help="kinds of findings to leave out")
    parser.add_argument("--strict", action="store_true", help="exit status 1 also for warnings")
    parser.add_argument("--no_vad", action="store_true", help="do not search speech with Silero VAD (faster)")
    parser.add_argument("--no_audio", action="store_true", help="do not embed recordings in the page")
    parser.add_argument("--no_loss", action="store_true", help="with --model: check only tokens and lengths")
    parser.add_argument("--batch_seconds", type=float, default=60.0, help="with --model: audio seconds per batch")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="number of processes")
    parser.add_argument("--overwrite", action="store_true", help="replace output files")
    parser.add_argument("--list_kinds", action="store_true", help="print all kinds with severity and threshold")
    args = parser.parse_args()
    if not args.data and not args.list_kinds:
        parser.error("DATA is missing: files or folders with training data")
    for name in ("json", "html", "fix"):
        if path := getattr(args, name):
            refuse_input(parser, f"--{name}", path, [item.rpartition("=")[2] for item in args.data])
            if os.path.exists(path) and not args.overwrite:
                parser.error(f"--{name} {path} exists; choose another name, or use --overwrite")
            if not os.path.isdir(folder := os.path.dirname(os.path.abspath(path))):
                parser.error(f"--{name} {path}: the folder {folder} is missing; create it")
    for name, minimum in (("num_workers", 1), ("batch_seconds", 1)):
        if getattr(args, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}")
    return args


def examine(args: argparse.Namespace) -> int:
    """Examines the data, writes all outputs and returns the exit status.

    Raises:
        OSError, ValueError: if the data or the model cannot be read, or a file cannot be written.
        ChildProcessError: if a process was killed.
    """
    from tqdm import tqdm

    from ..diagnosis.cleaning import dropped_file, kinds_table, output_files, write_clean, write_json
    from ..diagnosis.doctor import diagnose
    from ..diagnosis.kinds import KINDS, NOTE, WARNING
    from ..diagnosis.rows import read_rows

    if args.list_kinds:
        print(kinds_table())
        return 0
    for kind in args.ignore:
        if kind not in KINDS:
            raise ValueError(f"--ignore {kind}: unknown kind{did_you_mean(kind, KINDS)}; see --list_kinds")
    if args.fix and not args.overwrite:
        for path in (*output_files(args.fix).values(), dropped_file(args.fix)):
            if os.path.exists(path):
                raise FileExistsError(f"--fix: {path} exists; choose another name, or use --overwrite")
    vad = not args.no_vad
    if vad and importlib.util.find_spec("silero_vad") is None:
        logger.warning("speech is not searched: pip install 'hf_speechllm[vad]', or use --no_vad")
        vad = False
    more_checks, max_seconds = _model_checks(args)
    with tqdm(desc="reading", unit=" rows") as progress:
        rows = read_rows(args.data, progress.update)
    if not rows:
        raise ValueError(f"{', '.join(args.data)}: no rows")
    logging.getLogger("hf_speechllm.audio").setLevel(logging.ERROR)  # the findings say it
    with tqdm(desc="examining", total=len(rows), unit=" rows", smoothing=0.1) as progress:
        result = diagnose(rows, vad, max_seconds, args.num_workers, args.ignore, more_checks, progress.update)
    print_table(result)
    if args.json:
        write_json(result, args.json)
    if args.html:
        from ..diagnosis.page import write_page

        write_page(result, args.html, [item.rpartition("=")[2] for item in args.data], audio=not args.no_audio)
        print(f"page: {args.html}")
    if args.fix:
        files, dropped = write_clean(result, args.fix, WARNING if args.drop == "error" else NOTE)
        kept = len(result.rows) + result.num_unreadable - dropped
        print(f"clean rows: {kept} in {', '.join(files)}\ndropped rows: {dropped}, see {dropped_file(args.fix)}")
    return int(bool(result.count("error") or (args.strict and result.count("warning"))))


def _model_checks(args: argparse.Namespace) -> tuple[list[Any], float | None]:
    if not args.model_name_or_path:
        return [], None
    from ..diagnosis.model_checks import ModelChecks

    checks = ModelChecks(args.model_name_or_path, not args.no_loss, args.batch_seconds)
    return [checks], checks.max_seconds


def print_table(result: Diagnosis) -> None:
    """Prints the number of findings of each kind, with an example."""
    from ..diagnosis.kinds import KINDS, SEVERITIES

    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    hours = result.seconds / 3600
    print(f"{len(result.rows) + result.num_unreadable} rows, {hours:.2f} hours")
    kinds = result.kinds()
    width = max((len(kind) for kind, _ in kinds), default=0)
    for kind, findings in kinds:
        severity = KINDS[kind].severity
        shown = f"{COLOURS[severity]}{severity:8}\033[0m" if coloured else f"{severity:8}"
        print(f"{shown} {kind:{width}} {len(findings):7}  {next(_examples(findings))}")
        print(f"{'':{width + 18}}-> {KINDS[kind].advice}")
    counts = ", ".join(f"{severity}s: {result.count(severity)}" for severity in SEVERITIES)
    print(counts if kinds else "no findings")


def _examples(findings) -> Iterator[str]:
    from ..audio.downloads import printable

    for finding in findings:
        detail = finding.detail if len(finding.detail) <= EXAMPLE_WIDTH else finding.detail[:EXAMPLE_WIDTH] + "…"
        yield printable(f"{os.path.relpath(finding.file)}:{finding.line}: {detail}")


def main() -> None:
    args = parse_arguments()
    show_log()
    try:
        status = examine(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `doctor | head`; the main function ends the command
        raise
    except (OSError, ValueError) as error:  # unknown layout, missing file or model, full disk
        print(f"{prog()}: error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status)
