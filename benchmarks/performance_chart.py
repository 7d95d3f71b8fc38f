"""Draws the chart of docs/explanation/performance.md from the lines in benchmarks/results.

python benchmarks/performance_chart.py docs/explanation/performance.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "llm_only": "LLM only",
    "adaptor_only:encoder": "adaptor only, encoder output cached",
    "all": "all parameters",
    "lora:encoder": "LoRA on the LLM, encoder output cached",
}


def main() -> None:
    text = (RESULTS / "train_throughput_h100.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    figure, panels = plt.subplots(2, 2, figsize=(10, 4.6), constrained_layout=True)
    for panel, (mode, title) in zip(panels.flat, TITLES.items(), strict=True):
        of_mode = [line for line in lines if line["mode"] == mode]
        bars = {"plain loop": of_mode[0]["naive"]}
        bars |= {line["way"]: line["audio_seconds_per_second"] for line in of_mode}
        drawn = panel.barh(list(bars), list(bars.values()), color="#4878a8")
        panel.bar_label(drawn, [f"{value:,.0f}" for value in bars.values()], padding=3, fontsize=8)
        panel.set_title(title, fontsize=10, loc="right")  # long titles extend to the left
        panel.set_xlim(0, 1.25 * max(bars.values()))
        panel.invert_yaxis()
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.tick_params(labelsize=8)
        panel.set_xlabel("audio seconds per second", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(sys.argv[1], dpi=150)


if __name__ == "__main__":
    main()
