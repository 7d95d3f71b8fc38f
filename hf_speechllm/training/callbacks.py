"""Callbacks that write the training curve and the table of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..hub.publishing import CURVE_FILE
from .validation_files import TABLE_FILE, write_table

_TITLES = {
    "loss": "Loss per supervised token",
    "token_accuracy": "Token accuracy (teacher forcing)",
    "cer": "CER of decoded validation sets, %",
}
_HIGHEST_CER = 105  # percent; the CER of an untrained model has no limit and would flatten the other curves


class TrainingCurve(TrainerCallback):
    """Draws loss, token accuracy and CER over the steps, at every evaluation and save and at the end."""

    def __init__(self):
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
            draw_curve(state.log_history, Path(args.output_dir) / CURVE_FILE)


class ValidationTable(TrainerCallback):
    """Writes a table of all evaluations, with `--eval_cer`; each evaluation replaces the file."""

    def on_evaluate(self, args, state, control, **kwargs):
        """Writes the table."""
        if args.eval_cer and state.is_world_process_zero:
            write_table(state.log_history, Path(args.output_dir) / TABLE_FILE)


def draw_curve(log_history: list[dict], path: Path) -> None:
    """Draws the curves of a run into a PNG file.

    Args:
        log_history: of `TrainerState`: dicts with `step`, and `loss`, `token_accuracy`, or `eval_..._loss`, ...; with
            an `eval_..._cer`, the picture has a third panel.
        path: of the PNG file; the folder is created.
    """
    Figure, FigureCanvasAgg = _load_matplotlib()
    curves = {quantity: _curves(log_history, quantity) for quantity in _TITLES}
    quantities = [quantity for quantity in _TITLES if quantity != "cer" or curves["cer"]]
    labels = dict.fromkeys(label for quantity in _TITLES for label in curves[quantity])
    colours = {label: f"C{index}" for index, label in enumerate(labels)}  # a set has the same colour in every panel
    figure = Figure(figsize=(5 * len(quantities), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, quantity in zip(figure.subplots(1, len(quantities)), quantities, strict=True):
        highest = 0.0
        for label, points in curves[quantity].items():
            steps = [step for step, _ in points]
            values = [100 * value if quantity == "cer" else value for _, value in points]
            highest = max(highest, *values)
            marker = "" if label == "training" else "o"
            axes.plot(steps, values, label=label, color=colours[label], marker=marker, markersize=3)
        axes.set_title(_TITLES[quantity])
        axes.set_xlabel("Step")
        axes.grid(alpha=0.3)
        if curves[quantity]:
            axes.legend()
        if quantity == "token_accuracy":
            axes.set_ylim(0, 1.02)
        elif quantity == "cer":
            axes.set_ylim(0, min(max(1.05 * highest, 1.0), _HIGHEST_CER))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _load_matplotlib() -> tuple[Any, Any]:
    # Not at the top: the import takes a second, and most processes never draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return Figure, FigureCanvasAgg


def _curves(log_history: list[dict], quantity: str) -> dict[str, list[tuple[int, float]]]:
    """Returns points by label: of training, of every validation set, and of the mean of several sets."""
    keys = {key for entry in log_history for key in entry if key.startswith("eval_") and key.endswith(f"_{quantity}")}
    mean = f"eval_{quantity}"
    labels = {key: key.removeprefix("eval_").removesuffix(f"_{quantity}") for key in sorted(keys - {mean})}
    if mean in keys and len(labels) != 1:
        labels[mean] = "mean" if labels else "validation"
    labels = {quantity: "training", **labels}
    points = {
        label: [(entry["step"], entry[key]) for entry in log_history if key in entry] for key, label in labels.items()
    }
    return {label: line for label, line in points.items() if line}
