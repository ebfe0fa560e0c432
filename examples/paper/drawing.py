"""The figures of the scripts here."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from llm_narrow.figure_style import MARKERS, SERIES, Drawn, finished, legend, sheet, styled

NAMES = {"weights": "the paper's formula", "attribution": "the library's score"}


def attribution(result: Mapping[str, Any]) -> Drawn:
    """Scores against real ablations, by kind and formula."""
    with styled():
        figure, axes = sheet(5.4, nrows=2, ncols=2, squeeze=False)
        said = []
        for row, kind in enumerate(result["points"]):
            points = result["points"][kind]
            for column, formula in enumerate(NAMES):
                a, b = np.array(points[formula]), np.array(points["ablation"])
                both = (a > 0) & (b > 0)
                r = result["correlations"][formula][kind]["log"]["value"]
                here = axes[row][column]
                here.plot(np.log10(a[both]), np.log10(b[both]), ".", color=SERIES[row], alpha=0.4,
                          markersize=3)  # fmt: skip
                for axis in (here.xaxis, here.yaxis):
                    axis.set_major_locator(MaxNLocator(5))
                here.set_title(f"{kind}, r = {r:.2f}")
                here.set_xlabel(f"{NAMES[formula]}, log10 nats")
                here.set_ylabel("ablation, log10 nats" if not column else "")
                said.append(f"{kind} by {NAMES[formula]}, r = {r:.2f}")
        return finished(
            figure, "attribution", title="Attribution against ablation",
            caption="A point is a unit: its score, and what setting it to zero adds to the loss.",
            alt=f"Correlations of logarithms: {'; '.join(said)}.",
        )  # fmt: skip


def lasso_curves(result: Mapping[str, Any]) -> Drawn:
    """Held-out loss against the share of neurons that went, a line for each model."""
    with styled():
        figure, axes = sheet(3.2)
        lines, said = [], []
        for n, model in enumerate(result["models"].values()):
            at = [row["sparsity"] for row in model["curve"]]
            loss = [row["loss"] for row in model["curve"]]
            colour = SERIES[n % len(SERIES)]
            axes.fill_between(at, [e["low"] for e in loss], [e["high"] for e in loss],
                              color=colour, alpha=0.15, linewidth=0)  # fmt: skip
            lines += axes.plot(at, [e["value"] for e in loss], f"-{MARKERS[n % len(MARKERS)]}",
                               color=colour)  # fmt: skip
            said.append(f"{model['name']}, {loss[0]['value']:.2f} to {loss[-1]['value']:.2f}")
        axes.set_xlabel("share of neurons removed")
        axes.set_ylabel("held-out loss, nats per token")
        legend(figure, lines, list(result["models"]))
        return finished(
            figure, "lasso-curves", title="Neurons that go for free",
            caption="Loss after plain removal by score. Bands are 95 % intervals over documents.",
            alt=f"Held-out loss from first to last sparsity: {'; '.join(said)}.",
        )  # fmt: skip
