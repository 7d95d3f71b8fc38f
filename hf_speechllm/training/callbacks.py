"""What happens beside the training loop."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback

CURVE_FILE = "training_curve.png"


class TrainingCurve(TrainerCallback):
    """Draws loss and token accuracy of training and validation over the steps, at every save and at the end."""

    def on_save(self, args, state, control, **kwargs):
        """Redraws the picture, so that a long run can be looked at."""
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        """Draws the final picture."""
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        if state.is_world_process_zero:
            draw_curve(state.log_history, Path(args.output_dir) / CURVE_FILE)


def draw_curve(log_history: list[dict], path: Path) -> None:
    """Writes a picture of a run.

    Args:
        log_history: of `TrainerState`: dicts with `step`, and `loss`, `token_accuracy`, or `eval_..._loss`, ...
        path: of the PNG.
    """
    # Not at the top: takes a second, and most processes never draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, quantity, title in zip(
        panels,
        ("loss", "token_accuracy"),
        ("Loss per supervised token", "Token accuracy (teacher forcing)"),
        strict=True,
    ):
        names = sorted(
            {key for entry in log_history for key in entry if key == quantity or key.endswith(f"_{quantity}")}
        )
        for name in names:
            if name == f"train_{quantity}":  # the mean over the whole run, not a point of the curve
                continue
            points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
            label = "training" if name == quantity else name.removeprefix("eval_").removesuffix(f"_{quantity}")
            label = "validation" if label == quantity else label
            axes.plot(*zip(*points, strict=True), label=label, marker="" if name == quantity else "o", markersize=3)
        axes.set_title(title)
        axes.set_xlabel("Step")
        axes.grid(alpha=0.3)
        if names:
            axes.legend()
    panels[1].set_ylim(0, 1.02)
    figure.savefig(path, dpi=120)
