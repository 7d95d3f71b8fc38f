"""Callbacks that write the training curve and the table of evaluations."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..hub.publishing import CURVE_FILE
from .validation_files import TABLE_FILE, write_table

logger = logging.getLogger(__name__)

_TITLES = {
    "loss": "Loss per supervised token",
    "token_accuracy": "Token accuracy (teacher forcing), %",
    "cer": "Error rate of decoded validation sets, %",
    "learning_rate": "Learning rate",
}
_IN_PERCENT = ("token_accuracy", "cer")
_HIGHEST_RATE = 105  # percent; the error rate of an untrained model has no limit and would flatten the other curves
_TRAINING, _MEAN, _BASE = "training", "mean of the sets", "base model"
_MARKERS = "osv^Ph"


class TrainingCurve(TrainerCallback):
    """Draws losses, accuracies, error rates and learning rates over the steps, at evaluations, saves and the end.

    Args:
        rate_names: CER, WER or MER, by name of the validation set; may be filled later.
    """

    def __init__(self, rate_names: Mapping[str, str] | None = None):
        self.rate_names = rate_names
        self._drawn_step = -1

    def on_train_begin(self, args, state, control, **kwargs):
        """Loads matplotlib. The import leaves exceptions with frames in memory; during an epoch, these frames would
        keep the loader processes alive."""
        if state.is_world_process_zero:
            _load_matplotlib()

    def on_evaluate(self, args, state, control, **kwargs):
        """Draws the curve, so that users can watch a long run."""
        self._draw(args, state)

    def on_save(self, args, state, control, **kwargs):
        """Draws the curve, unless an evaluation at the same step has drawn the curve."""
        if state.global_step != self._drawn_step:
            self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        """Draws the final curve."""
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        self._drawn_step = state.global_step
        if state.is_world_process_zero:
            draw_curve(state.log_history, Path(args.output_dir) / CURVE_FILE, self.rate_names)


class ValidationTable(TrainerCallback):
    """Writes a table of all evaluations, with `--eval_cer`; each evaluation replaces the file."""

    def on_evaluate(self, args, state, control, **kwargs):
        """Writes the table."""
        if args.eval_cer and state.is_world_process_zero:
            write_table(state.log_history, Path(args.output_dir) / TABLE_FILE)


def draw_curve(log_history: list[dict], path: Path, rate_names: Mapping[str, str] | None = None) -> None:
    """Draws the curves of a run into a PNG file: a panel for each quantity in the log.

    Marks are validations, a hollow diamond at step 0 is the base model, a dashed line is the mean of several sets.

    Args:
        log_history: of `TrainerState`: dicts with `step`, and `loss`, `token_accuracy`, `PART_learning_rate` or
            `learning_rate`, or `eval_..._loss`, `eval_..._cer`, ...
        path: of the PNG file; the folder is created.
        rate_names: CER, WER or MER, by name of the validation set.
    """
    matplotlib, Figure, FigureCanvasAgg = _load_matplotlib()
    found = {quantity: _curves(log_history, quantity) for quantity in _TITLES}
    curves = {quantity: lines for quantity, lines in found.items() if lines or quantity == "loss"}
    columns = 2 if len(curves) == 4 else len(curves)
    rows = -(-len(curves) // columns)
    styles = _styles(label for lines in curves.values() for label in lines)
    families, names = _fonts_and_names(tuple(styles))
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.family": families}):
        figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (quantity, lines) in zip(
            figure.subplots(rows, columns, squeeze=False).flat, curves.items(), strict=True
        ):
            _draw_panel(axes, quantity, lines, styles, rate_names or {}, names)
        figure.savefig(path, dpi=120)


@functools.cache
def _fonts_and_names(labels: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Returns font families with the letters of all labels, and the names to show for labels without a font."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    def lacking(path: str, text: str) -> set[str]:
        return {letter for letter in text if ord(letter) not in FT2Font(path).get_charmap()}

    usual = font_manager.FontProperties()
    families, names = usual.get_family(), {}
    for number, label in enumerate(labels, start=1):
        letters = "".join(lacking(font_manager.findfont(usual), label))
        fonts = (font for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name)
        if letters and (found := next((font.name for font in fonts if not lacking(font.fname, letters)), None)):
            families = [*families, found]
        elif letters:
            names[label] = f"set {number}"
            logger.warning(
                "no installed font has the letters of %s: the training curve shows the name %s; install a font such "
                "as Noto Sans CJK",
                label,
                names[label],
            )
    return families, names


def _styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns line styles by label: a label has the same style in every panel, and the mean has no set's colour."""
    others = [label for label in dict.fromkeys(labels) if label not in (_TRAINING, _MEAN)]
    marked = {
        label: {"color": f"C{1 + i % 9}", "marker": _MARKERS[i % len(_MARKERS)], "markersize": 4}
        for i, label in enumerate(others)
    }
    return {
        **marked,
        _TRAINING: {"color": "C0"},
        _MEAN: {"color": "black", "linestyle": "--", "marker": "D", "markersize": 4},
    }


def _draw_panel(
    axes: Any,
    quantity: str,
    lines: Mapping[str, list[tuple[int, float]]],
    styles: Mapping[str, Mapping[str, Any]],
    rate_names: Mapping[str, str],
    names: Mapping[str, str],
) -> None:
    scale = 100 if quantity in _IN_PERCENT else 1
    highest = 0.0
    for label, points in lines.items():
        steps, values = [step for step, _ in points], [scale * value for _, value in points]
        highest = max(highest, *values)
        style = dict(styles[label])
        shown = names.get(label, label)
        if quantity == "learning_rate":
            axes.plot(steps, values, color=style["color"], label=shown)
            continue
        if quantity == "cer":
            name = rate_names.get(label, rate_names.get("", ""))  # the name of a single set is empty
            shown += f":{f' {name}' if name else ''} {values[0]:.2f}"
            shown += f" to {values[-1]:.2f}" if len(values) > 1 else ""
        axes.plot(steps, values, label=shown, **style)
        if steps[0] == 0:
            base = min(values[0], _HIGHEST_RATE) if quantity == "cer" else values[0]
            axes.plot(
                0, base, color=style["color"], marker="D", markersize=9, fillstyle="none", linestyle="", clip_on=False
            )
    axes.set_title(_TITLES[quantity])
    axes.set_xlabel("Step")
    axes.grid(alpha=0.3)
    if any(line.get_fillstyle() == "none" for line in axes.lines):
        axes.plot([], [], color="gray", marker="D", markersize=9, fillstyle="none", linestyle="", label=_BASE)
    if lines:
        axes.legend()
    if quantity == "token_accuracy":
        axes.set_ylim(0, 102)
    elif quantity == "cer":
        axes.set_ylim(0, min(max(1.05 * highest, 1.0), _HIGHEST_RATE))


def _load_matplotlib() -> tuple[Any, Any, Any]:
    # Not at the top: the import takes a second, and most processes never draw.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return matplotlib, Figure, FigureCanvasAgg


def _curves(log_history: list[dict], quantity: str) -> dict[str, list[tuple[int, float]]]:
    """Returns points by label: of training (or of each part), of every validation set, and of the mean of several."""
    keys = {key for entry in log_history for key in entry if key.endswith(f"_{quantity}")}
    parts = sorted(key for key in keys if not key.startswith("eval_")) if quantity == "learning_rate" else []
    labels = {key: key.removesuffix(f"_{quantity}") for key in parts} or {quantity: _TRAINING}
    mean = f"eval_{quantity}"
    sets = sorted(key for key in keys - {mean} if key.startswith("eval_"))
    labels |= {key: key.removeprefix("eval_").removesuffix(f"_{quantity}") for key in sets}
    if mean in keys and len(sets) != 1:
        labels[mean] = _MEAN if sets else "validation"
    points = {
        label: [(entry["step"], entry[key]) for entry in log_history if key in entry] for key, label in labels.items()
    }
    return {label: line for label, line in points.items() if line}
