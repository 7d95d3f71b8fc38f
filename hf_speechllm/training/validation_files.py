"""Files that validation writes: a table of all evaluations, and transcripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.scoring import count_errors
from ..evaluation.validation_metrics import COUNTS, metric_prefix, set_names
from ..files import atomic_write

TABLE_FILE, SAMPLES_FOLDER = "validation.tsv", "validation_samples"  # in the output folder
SAMPLES_SHOWN = 10  # written transcripts per set


@dataclass(frozen=True)
class Sample:
    """A decoded row.

    Args:
        position: index of the row in the set.
        name: `FILE:LINE` of the row.
        reference, hypothesis: correct and recognised transcript.
    """

    position: int
    name: str
    reference: str
    hypothesis: str


def write_table(log_history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Writes all evaluations of a run into a tab-separated table, atomically.

    Args:
        log_history: of `TrainerState`.
        path: of the file.
    """
    lines = ["\t".join(("step", "set", "loss", "token_accuracy", "cer_percent", *COUNTS))]
    for entry in log_history:
        for name in set_names(entry):
            prefix = metric_prefix("eval", name)
            cer = entry.get(f"{prefix}_cer")
            cells = [entry["step"], name or "validation"]
            cells += [f"{entry[f'{prefix}_{measure}']:.5f}" for measure in ("loss", "token_accuracy")]
            cells += [
                "" if cer is None else f"{100 * cer:.3f}",
                *(entry.get(f"{prefix}_{count}", "") for count in COUNTS),
            ]
            lines.append("\t".join(map(str, cells)))
    with atomic_write(path) as file:
        file.write("\n".join(lines) + "\n")


def write_samples(samples: dict[str, list[Sample]], path: Path) -> None:
    """Writes references and hypotheses into a text file.

    Args:
        samples: samples by name of the set.
        path: of the file.
    """
    blocks = []
    for set_name, rows in samples.items():
        blocks.append(f"# {set_name or 'validation'}")
        for row in rows:
            counts = count_errors(row.reference, row.hypothesis)
            blocks.append(
                f"{row.name}: {counts.errors} errors, {counts.reference_tokens} tokens\n"
                f"ref: {row.reference}\nhyp: {row.hypothesis}"
            )
    with atomic_write(path) as file:
        file.write("\n\n".join(blocks) + "\n")
