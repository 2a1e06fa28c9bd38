"""Draws the losses of runs over their tokens: python tests/benchmarks/loss_curve.py OUT.png RUN_DIR
[RUN_DIR ...]"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from launch.run.folder import read_rows


def main(out: str, runs: list[str]) -> None:
    """One panel: training loss thin, validation loss with dots, the counting baselines of the first
    run as lines."""
    figure, axes = plt.subplots(figsize=(7.2, 3.8), dpi=150)
    for color, run in zip(("#1f5fa8", "#c4532d", "#3d8b40", "#7a4fa3"), runs, strict=False):
        rows, summary = (
            read_rows(Path(run) / "metrics.jsonl"),
            json.loads((Path(run) / "summary.json").read_text()),
        )
        train = [(row["tokens"], row["train/loss"]) for row in rows if row.get("train/loss")]
        validation = [(row["tokens"], row["val/loss"]) for row in rows if "val/loss" in row]
        axes.plot(
            *zip(*train, strict=True),
            color=color,
            linewidth=0.8,
            alpha=0.5,
            label=f"{summary['name'].rsplit('-', 1)[0]}, training",
        )
        axes.plot(
            *zip(*validation, strict=True), "o-", color=color, markersize=4, label="validation"
        )
        axes.annotate(
            f"{summary['val/loss']:.2f}",
            validation[-1],
            textcoords="offset points",
            xytext=(5, -3),
            color=color,
        )
    for name, style in (("unigram", ":"), ("bigram", "--")):
        axes.axhline(
            summary[f"baseline/{name}"],
            color="0.4",
            linestyle=style,
            linewidth=1,
            label=f"{name} {summary[f'baseline/{name}']:.2f}",
        )
    axes.set(xlabel="training tokens", ylabel="loss, nats per token")
    axes.set_xlim(0, train[-1][0] * 1.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
