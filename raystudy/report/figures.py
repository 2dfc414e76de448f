"""The curves and bars of a report: accuracy (Fig. 2 and 3 of the paper), source reliance, AD/AI (its Table 2).

In: the tables of `raystudy.evaluate.tables`.  Out: matplotlib figures; pyplot is not used.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TEST_SETS = {"Test-100H1": "#c0392b", "Test-100H2": "#2563a8", "Test-50-50": "#c98a00"}
METHODS = {"prp": ("PRP", "#2563a8"), "protopnet": ("ProtoPNet", "#c98a00"), "random": ("random control", "#9aa0a6")}
INK, GRID = "#22272e", "#e3e6ea"


def png(figure: Figure, dpi: int = 144) -> bytes:
    """Return a figure as PNG bytes without a date; its layout is settled by that."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=dpi, metadata={"Software": None})
    figure.set_layout_engine("none")
    return sink.getvalue()


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG bytes without a date."""
    sink = io.BytesIO()
    with rc_context({"svg.hashsalt": "raystudy"}):  # ids of clip paths; random otherwise
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return sink.getvalue()


def accuracy_curves(
    mixtures: pd.DataFrame, trials: pd.DataFrame, task: str, sources: Sequence[str], title: str
) -> Figure:
    """Draw accuracy over the mixture, one line a test set: dots are seeds, bands 95 % intervals.

    Parameters
    ----------
    mixtures : rows of `mixture_table` of one arm.
    trials : rows of `accuracy_table` of the same arm.
    """
    figure = Figure(figsize=(7.2, 4.3), layout="constrained")
    axes = figure.add_subplot()
    for test_set, colour in TEST_SETS.items():
        line = mixtures[mixtures["test_set"] == test_set].sort_values("h1_share")
        if line.empty:
            continue
        x = line["h1_share"].to_numpy(float)
        axes.fill_between(
            x,
            line["accuracy_low"].to_numpy(float),
            line["accuracy_high"].to_numpy(float),
            color=colour,
            alpha=0.14,
            lw=0,
        )
        axes.plot(x, line["accuracy"].to_numpy(float), color=colour, lw=2, label=test_set)
        dots = trials[trials["test_set"] == test_set]
        axes.scatter(dots["h1_share"], dots["accuracy"], s=13, color=colour, alpha=0.75, zorder=3, lw=0)
    axes.axhline(50, color=INK, lw=0.8, ls=(0, (4, 4)), alpha=0.5)
    axes.set(xlim=(-2, 102), ylim=(-3, 103), ylabel="accuracy, %")
    axes.set_xlabel(f"share of {task} films from {sources[0]}, % (rest from {sources[1]})")
    seeds = int(mixtures["seeds"].max()) if len(mixtures) else 0
    n = ", ".join(f"{k}: n = {int(v)}" for k, v in mixtures.groupby("test_set")["n"].max().items())
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.annotate(
        f"{seeds} seed{'s' if seeds != 1 else ''}; {n} films",
        (0, -0.2),
        xycoords="axes fraction",
        fontsize=8,
        color="#5b6470",
    )
    _legend_above(axes)
    _tidy(axes)
    return figure


def reliance_curves(reliance: pd.DataFrame, sources: Sequence[str], title: str) -> Figure:
    """Draw source reliance and skill over the mixture with 95 % intervals; rows of `reliance_table` of one arm."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    rows = reliance.sort_values("h1_share")
    x = rows["h1_share"].to_numpy(float)
    for name, label, colour in (
        ("source_reliance", "source reliance", "#7b2d8b"),
        ("skill", "skill (disease)", "#1d7a4f"),
    ):
        low, high = rows[f"{name}_low"].to_numpy(float), rows[f"{name}_high"].to_numpy(float)
        axes.fill_between(x, low, high, color=colour, alpha=0.14, lw=0)
        axes.plot(x, rows[name].to_numpy(float), color=colour, lw=2, marker="o", ms=4, label=label)
    axes.axhline(0, color=INK, lw=0.8, alpha=0.6)
    axes.set(xlim=(-2, 102), ylim=(-1.06, 1.06), xlabel=f"share of positives from {sources[0]}, %")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    _legend_above(axes)
    _tidy(axes)
    return figure


def faithfulness_bars(table: pd.DataFrame, title: str) -> Figure:
    """Draw AD and AI by mixture and method with 95 % intervals; rows of `faithfulness_mixture_table` of one arm."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    shares = sorted(table["h1_share"].unique())
    for place, (name, label) in enumerate(
        (("average_drop", "average drop, % (lower is better)"), ("average_increase", "average increase, % (higher)"))
    ):
        axes = figure.add_subplot(1, 2, place + 1)
        for offset, (method, (word, colour)) in zip((-3.0, 0.0, 3.0), METHODS.items(), strict=True):
            rows = table[table["method"] == method].sort_values("h1_share")
            x = rows["h1_share"].to_numpy(float) + (offset * 0.5 if len(shares) > 1 else offset)
            y = rows[name].to_numpy(float)
            error = np.abs(np.stack([y - rows[f"{name}_low"], rows[f"{name}_high"] - y]))
            axes.errorbar(x, y, error, color=colour, fmt="o", ms=4, lw=1.2, label=word)
        axes.set_xlabel("share of positives from the first hospital, %")
        axes.set_title(label, loc="left", fontsize=9, color=INK)
        axes.set_ylim(bottom=0)
        _tidy(axes)
        if place == 0:
            handles = axes.get_legend_handles_labels()
            figure.legend(*handles, frameon=False, fontsize=8, loc="outside upper right", ncols=3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _legend_above(axes: Axes) -> None:
    """Put the legend on the title's line, where no curve can run through it."""
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.01, 0.99), ncols=3, borderaxespad=0.2)


def _tidy(axes: Axes) -> None:
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa0a6")
    axes.tick_params(colors=INK, labelsize=9)
