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

from ..console import command, print_summary, progress_bar, show_log
from ..options import usable_cores
from .parser import Parser, did_you_mean, prog, refuse_input, require_writable

if TYPE_CHECKING:
    from ..diagnosis.doctor import Diagnosis

logger = logging.getLogger(__name__)

EXAMPLE_WIDTH = 110  # characters of the detail in the console table
COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


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
    parser.add_argument("--num_workers", type=int, default=usable_cores(), help="number of processes")
    parser.add_argument("--overwrite", action="store_true", help="replace output files")
    parser.add_argument("--list_kinds", action="store_true", help="print all kinds with severity and threshold")
    parser.file_status = 2  # 1: the data have errors
    args = parser.parse_args()
    if not args.data and not args.list_kinds:
        parser.error("DATA is missing: files or folders with training data")
    for name in ("json", "html", "fix"):
        if path := getattr(args, name):
            refuse_input(parser, f"--{name}", path, [item.rpartition("=")[2] for item in args.data])
            if os.path.exists(path) and not args.overwrite:
                parser.file_error(f"--{name} {path} exists; choose another name, or use --overwrite")
            require_writable(parser, f"--{name}", path)
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
    with progress_bar(desc="reading", unit=" rows") as progress:
        rows = read_rows(args.data, progress.update)
    if not rows:
        raise ValueError(f"{', '.join(args.data)}: no rows")
    logging.getLogger("hf_speechllm.audio").setLevel(logging.ERROR)  # the findings say it
    with progress_bar(desc="examining", total=len(rows), unit=" rows", smoothing=0.1) as progress:
        result = diagnose(rows, vad, max_seconds, args.num_workers, args.ignore, more_checks, progress.update)
    print_findings(result)
    facts: dict[str, Any] = {}
    if args.json:
        write_json(result, args.json)
        facts["findings"] = args.json
    if args.html:
        from ..diagnosis.page import write_page

        write_page(result, args.html, [item.rpartition("=")[2] for item in args.data], audio=not args.no_audio)
        facts["page"] = args.html
    if args.fix:
        files, dropped = write_clean(result, args.fix, WARNING if args.drop == "error" else NOTE)
        kept = len(result.rows) + result.num_unreadable - dropped
        facts["clean rows"] = f"{kept} in {', '.join(files)}"
        facts["dropped rows"] = f"{dropped}, see {dropped_file(args.fix)}"
    print_summary(facts, _next_commands(args, result))
    return int(bool(result.count("error") or (args.strict and result.count("warning"))))


def _next_commands(args: argparse.Namespace, result: Diagnosis) -> list[str]:
    """Returns the commands to run next: clean the data if rows can be left out, otherwise plan a run."""
    from ..diagnosis.cleaning import OF_THE_CORPUS
    from ..diagnosis.kinds import NOTE

    if not args.fix and any(item.severity != NOTE and item.kind not in OF_THE_CORPUS for item in result.findings):
        return [command("doctor", *args.data, fix="clean.jsonl")]
    if args.fix:
        return []
    files: dict[str, list[str]] = {"train": [], "dev": []}
    for split, file in dict.fromkeys((row.split, row.file) for row in result.rows):
        if split in files and file.endswith(".jsonl"):
            files[split].append(os.path.relpath(file))
    if not files["train"]:
        return []
    model = args.model_name_or_path or "MODEL"
    lists = {"train_file": files["train"], "validation_file": files["dev"] or None}
    return [command("plan", model_name_or_path=model, **lists)]


def _model_checks(args: argparse.Namespace) -> tuple[list[Any], float | None]:
    if not args.model_name_or_path:
        return [], None
    from ..diagnosis.model_checks import ModelChecks

    checks = ModelChecks(args.model_name_or_path, not args.no_loss, args.batch_seconds)
    return [checks], checks.max_seconds


def print_findings(result: Diagnosis) -> None:
    """Prints the number of findings of each kind, with an example: a table on a terminal, otherwise lines."""
    from ..diagnosis.kinds import KINDS, SEVERITIES

    hours = result.seconds / 3600
    print(f"{len(result.rows) + result.num_unreadable} rows, {hours:.2f} hours")
    kinds = result.kinds()
    rows = [
        (KINDS[kind].severity, kind, len(found), next(_examples(found)), KINDS[kind].advice) for kind, found in kinds
    ]
    if rows and sys.stdout.isatty():
        _print_rich(rows)
    else:
        width = max((len(kind) for kind, _ in kinds), default=0)
        for severity, kind, count, example, advice in rows:
            print(f"{severity:8} {kind:{width}} {count:7}  {example}\n{'':{width + 18}}-> {advice}")
    counts = ", ".join(f"{severity}s: {result.count(severity)}" for severity in SEVERITIES)
    print(counts if kinds else "no findings")


def _print_rich(rows: list[tuple[str, str, int, str, str]]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for severity, kind, count, example, advice in rows:
        title = Text.assemble((f"{severity:8}", COLOURS[severity]), " ", (kind, "bold"), f"  {count}")
        console.print(title)
        console.print(Padding(Text(example, "dim"), (0, 0, 0, 9)))
        console.print(Padding(Text(f"-> {advice}"), (0, 0, 0, 9)))


def _examples(findings) -> Iterator[str]:
    from ..audio.downloads import printable

    for finding in findings:
        detail = finding.detail if len(finding.detail) <= EXAMPLE_WIDTH else finding.detail[:EXAMPLE_WIDTH] + "…"
        yield printable(f"{os.path.relpath(finding.file)}:{finding.line}: {detail}")


def main() -> None:
    """Runs the command; see the docstring of the module."""
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
