"""What the curves show: one line a test set, every seed as a dot, bands as given; the same bytes each time."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from raystudy.report.figures import METHODS, TEST_SETS, accuracy_curves, faithfulness_bars, png, reliance_curves, svg

SHARES = (0, 50, 100)


def mixtures() -> pd.DataFrame:
    rows = [
        {
            "h1_share": x,
            "test_set": t,
            "seeds": 2,
            "n": 80,
            "accuracy": a,
            "accuracy_low": a - 5,
            "accuracy_high": a + 5,
        }
        for t, line in zip(TEST_SETS, ((5, 70, 95), (95, 70, 5), (50, 70, 50)), strict=True)
        for x, a in zip(SHARES, line, strict=True)
    ]
    return pd.DataFrame(rows)


def trials() -> pd.DataFrame:
    one = mixtures().assign(seed=0)
    return pd.concat([one, one.assign(seed=1, accuracy=one["accuracy"] + 2)], ignore_index=True)


def accuracy() -> Figure:
    return accuracy_curves(mixtures(), trials(), "pneumonia", ["H1", "H2"], "Accuracy")


def test_accuracy_has_a_line_a_test_set_and_a_dot_for_every_seed():
    axes = accuracy().axes[0]
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.lines}
    assert {name for name in lines if name in TEST_SETS} == set(TEST_SETS)
    assert lines["Test-100H1"].tolist() == [5, 70, 95]
    dots = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert [len(np.asarray(c.get_offsets())) for c in dots] == [6, 6, 6]  # three mixtures, two seeds


def test_the_figure_says_how_many_seeds_and_films():
    texts = " ".join(t.get_text() for t in accuracy().axes[0].texts)
    assert "2 seeds" in texts
    assert "Test-50-50: n = 80" in texts


def test_the_legend_lies_above_the_curves():
    for figure in (accuracy(), reliance_curves(reliance(), ["H1", "H2"], "Reliance")):
        png(figure)  # draws, so that the layout is settled
        axes = figure.axes[0]
        legend = axes.get_legend()
        assert legend is not None
        assert legend.get_window_extent().y0 >= axes.get_window_extent().y1 - 2


def reliance() -> pd.DataFrame:
    rows = [
        {"h1_share": x, "source_reliance": r, "source_reliance_low": r - 0.1, "source_reliance_high": r + 0.1}
        | {"skill": 0.2, "skill_low": 0.1, "skill_high": 0.3}
        for x, r in zip(SHARES, (-0.9, 0.0, 0.9), strict=True)
    ]
    return pd.DataFrame(rows)


def faithfulness() -> pd.DataFrame:
    names = [f"{n}{e}" for n in ("average_drop", "average_increase") for e in ("", "_low", "_high")]
    rows = [
        {"h1_share": x, "method": m, **dict(zip(names, (20, 10, 30, 40, 30, 50), strict=True))}
        for x in SHARES
        for m in METHODS
    ]
    return pd.DataFrame(rows)


def test_faithfulness_shows_every_method_with_its_random_control():
    figure = faithfulness_bars(faithfulness(), "Faithfulness")
    words = {t.get_text() for t in figure.legends[0].get_texts()}
    assert words == {"PRP", "ProtoPNet", "random control"}
    assert len(figure.axes) == 2


def test_figures_come_out_as_the_same_bytes_each_time():
    for draw in (accuracy, lambda: faithfulness_bars(faithfulness(), "F")):
        assert png(draw()) == png(draw())
        assert svg(draw()) == svg(draw())
