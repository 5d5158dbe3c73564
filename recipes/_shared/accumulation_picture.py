"""The picture of what accumulation_proof.py measures: python accumulation_picture.py DATA.json PICTURE.png."""

import hashlib
import json
import sys
from pathlib import Path

TOLERANCE = 1e-5
STYLES = [("transformers.Trainer", "X--", "#d55e00", 10), ("GradUtilsTrainer", "o-", "#0072b2", 6)]


def draw_accumulation(data, picture):
    """Draw the errors of each head over the accumulation; returns the picture, or None without matplotlib.

    The picture keeps the hash of its data, so that a test can tell whether it was drawn from them.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    measured = json.loads(data.read_text())
    accumulation = measured["accumulation"]
    figure, axes = pyplot.subplots(1, len(measured["errors"]), figsize=(9, 3.1), sharey=True, layout="constrained")
    for axis, (head, errors) in zip(axes, measured["errors"].items(), strict=True):
        axis.axhspan(1e-8, 1e-6, color="0.92")
        for trainer, style, color, size in STYLES:
            axis.plot(accumulation, errors[trainer], style, color=color, markersize=size, label=trainer)
        for step, error in zip(accumulation, errors["transformers.Trainer"], strict=True):
            if error > TOLERANCE:
                axis.annotate(f"{error:.1f}", (step, error), (0, 8), textcoords="offset points", ha="center")
        axis.set(title=head, xscale="log", yscale="log", xlim=(0.8, 10), ylim=(1e-8, 1e3), xlabel="accumulation")
        axis.set_xticks(accumulation, [str(step) for step in accumulation])
        axis.yaxis.set_major_formatter(ticker.LogFormatter())
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    ranks = "1 rank" if measured["ranks"] == 1 else f"{measured['ranks']} ranks"
    figure.suptitle(f"The same {measured['samples']} samples on {ranks}", fontsize="medium")
    axes[0].set_ylabel("relative error of the gradient")
    axes[0].text(0.85, 1.3e-8, "rounding in float32", fontsize="small", color="0.4")
    axes[0].legend(loc="upper left", frameon=False)
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110, metadata={"Description": f"sha256 of the data: {digest}"})
    pyplot.close(figure)
    return picture


if __name__ == "__main__":
    print(draw_accumulation(Path(sys.argv[1]), Path(sys.argv[2])))
