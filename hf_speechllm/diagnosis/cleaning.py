"""Writing of findings as JSON, and of the rows without findings as JSONL."""

from __future__ import annotations

import json
import os
import textwrap
from collections import defaultdict
from typing import Any

from ..data.jsonl import write_jsonl
from ..data.utterance import SPLITS
from ..files import atomic_write
from .doctor import Diagnosis, Finding
from .kinds import KINDS, NOTE, SEVERITIES

# Kinds that concern the whole corpus: leaving out the row that is named would not help.
OF_THE_CORPUS = frozenset({"speaker-in-two-splits", "prompt-mismatch", "low-sampling-rate"})


def as_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """Returns the content of the JSON report: totals, and findings with row ID, file, line, kind and detail."""
    return {
        "rows": len(diagnosis.rows) + diagnosis.num_unreadable,
        "hours": round(diagnosis.seconds / 3600, 4),
        "vad": diagnosis.has_vad,
        **{f"{severity}s": diagnosis.count(severity) for severity in SEVERITIES},
        "kinds": {kind: len(findings) for kind, findings in diagnosis.kinds()},
        "findings": [
            {
                "id": finding.id, "file": finding.file, "line": finding.line, "split": finding.split,
                "kind": finding.kind, "severity": finding.severity, "detail": finding.detail,
            }
            for finding in diagnosis.findings
        ],
    }  # fmt: skip


def write_json(diagnosis: Diagnosis, path: str) -> None:
    """Writes the JSON report."""
    with atomic_write(path) as file:
        json.dump(as_dict(diagnosis), file, ensure_ascii=False, indent=1)
        file.write("\n")


def output_files(path: str, splits: list[str] | tuple[str, ...] = SPLITS) -> dict[str, str]:
    """Returns the file of each split: `clean.jsonl` for one split, otherwise `clean.train.jsonl`, ..."""
    root, suffix = os.path.splitext(path)
    return {split: path if len(splits) == 1 else f"{root}.{split}{suffix}" for split in splits}


def dropped_file(path: str) -> str:
    """Returns the file for the list of dropped rows."""
    return f"{os.path.splitext(path)[0]}.dropped.tsv"


def write_clean(diagnosis: Diagnosis, path: str, keep: str = NOTE) -> tuple[list[str], int]:
    """Writes the rows without findings, and the list of the other rows with the reasons.

    Args:
        diagnosis: result of the examination.
        path: JSONL to write; see `output_files`. The list is `dropped_file(path)`.
        keep: severity of findings with which a row is kept, `warning` or `note`; milder findings do not count either.

    Returns:
        Paths of the written JSONL, and the number of dropped rows, unreadable rows included.

    Raises:
        ValueError: if no row is left.
        OSError: if a file cannot be written.
    """
    reasons: dict[int, list[Finding]] = defaultdict(list)
    for finding in diagnosis.findings:
        drops = SEVERITIES.index(finding.severity) < SEVERITIES.index(keep) and finding.kind not in OF_THE_CORPUS
        if drops and finding.row is not None:
            reasons[finding.row].append(finding)
    unreadable = [finding for finding in diagnosis.findings if finding.row is None]
    if len(reasons) == len(diagnosis.rows):
        raise ValueError(f"--fix {path}: no row is left; keep some kinds with --ignore, or warnings with --drop error")
    splits = [split for split in SPLITS if any(row.split == split for row in diagnosis.rows)]
    files = output_files(path, splits)
    for split, file in files.items():
        kept = (row for index, row in enumerate(diagnosis.rows) if row.split == split and index not in reasons)
        write_jsonl((row.record for row in kept), file)
    with atomic_write(dropped_file(path)) as table:
        table.write("file\tline\tid\tsplit\tkinds\tdetails\n")
        for findings in [*([finding] for finding in unreadable), *(reasons[index] for index in sorted(reasons))]:
            first = findings[0]
            kinds = ",".join(dict.fromkeys(finding.kind for finding in findings))
            details = "; ".join(finding.detail for finding in findings)
            cells = (first.file, first.line, first.id, first.split, kinds, details)
            table.write("\t".join(" ".join(str(cell).split()) for cell in cells) + "\n")
    return list(files.values()), len(unreadable) + len(reasons)


def kinds_table() -> str:
    """Returns the table of all kinds: severity, threshold, reason, advice."""
    lines = []
    for severity in SEVERITIES:
        for name, kind in KINDS.items():
            if kind.severity == severity:
                number = "" if kind.limit is None else f"{kind.limit:g} {kind.unit}. "
                unit = "" if kind.limit is not None or not kind.unit else f"{kind.unit}. "
                text = f"{severity:8} {name:24} {number}{unit}{_capital(kind.reason)}. {_capital(kind.advice)}."
                lines += textwrap.wrap(text, 120, subsequent_indent=" " * 34)
    return "\n".join(lines)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
