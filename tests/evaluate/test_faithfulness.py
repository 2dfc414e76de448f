"""AD and AI: the check values of method.md c, multiplicity, pairing, intervals over patients."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raystudy.evaluate.faithfulness import (
    average_drop,
    average_increase,
    increased,
    method_difference,
    relative_drop,
    summarise,
)
from raystudy.evaluate.tables import KeyedTable, faithfulness_mixture_table


def pairs_of(rows: list[tuple[str, int, int, str, int, float, float]]) -> pd.DataFrame:
    table = pd.DataFrame(
        rows, columns=["image_id", "prototype", "multiplicity", "method", "draw", "score", "score_masked"]
    )
    table["patient_id"] = table["image_id"].str[:2]
    table["source"] = "H1"
    return table


def random_pairs(seed: int, images: int = 30, shift: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(images):
        for j in (0, 3):
            s = 1 + rng.random()
            o = s + rng.normal(-0.1, 0.2)
            rows.append((f"{i:02d}", j, 5, "prp", 0, s, o))
            rows.append((f"{i:02d}", j, 5, "protopnet", 0, s, max(0.01, o + shift)))
    return pairs_of(rows)


def test_check_values_of_the_method() -> None:
    s, o = [2, 2, 2], [1, 3, 2]
    assert average_drop(s, o) == pytest.approx(16.667, abs=5e-4)
    assert average_increase(s, o) == pytest.approx(33.333, abs=5e-4)


def test_an_equal_score_is_neither_drop_nor_increase() -> None:
    assert relative_drop([2.0], [2.0]).tolist() == [0]
    assert increased([2.0], [2.0]).tolist() == [False]


def test_a_score_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        relative_drop([0.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        relative_drop([1.0], [np.nan])


@given(st.lists(st.tuples(st.floats(0.01, 9), st.floats(0.01, 9), st.integers(1, 4)), min_size=1, max_size=12))
def test_weighting_by_multiplicity_equals_repeating_the_pair(rows: list[tuple[float, float, int]]) -> None:
    s, o, m = (np.array(c) for c in zip(*rows, strict=True))
    assert average_drop(s, o, m) == pytest.approx(average_drop(np.repeat(s, m), np.repeat(o, m)))
    assert average_increase(s, o, m) == pytest.approx(average_increase(np.repeat(s, m), np.repeat(o, m)))


def test_summary_weights_by_multiplicity_and_reports_unique_prototypes_beside_it() -> None:
    table = pairs_of([("p0a", 0, 9, "prp", 0, 2.0, 1.0), ("p0a", 4, 1, "prp", 0, 2.0, 2.5)])
    value = summarise([table], 0)["prp"]
    assert (value.n_images, value.n_pairs) == (1, 10)
    assert value.average_drop.estimate == pytest.approx(45)  # 9 of 10 pairs drop by half
    assert value.average_increase.estimate == pytest.approx(10)
    assert (value.unique_average_drop, value.unique_average_increase) == (25, 50)


def test_draws_are_averaged_and_do_not_count_as_further_pairs() -> None:
    table = pairs_of([("p0a", 0, 10, "prp", 0, 2.0, 1.0), ("p0a", 0, 10, "prp", 1, 2.0, 2.0)])
    value = summarise([table], 0)["prp"]
    assert value.n_pairs == 10
    assert value.average_drop.estimate == pytest.approx(25)


def test_the_order_of_rows_does_not_matter() -> None:
    table = random_pairs(0)
    shuffled = table.sample(frac=1, random_state=3)
    one, other = summarise([table], 1)["prp"], summarise([shuffled], 1)["prp"]
    assert one.average_drop.low == pytest.approx(other.average_drop.low, abs=1e-12)
    assert one.average_increase == other.average_increase


def test_a_method_that_never_increases_has_an_interval_of_positive_width() -> None:
    table = pairs_of([(f"{i:02d}", 0, 10, "prp", 0, 2.0, 1.0) for i in range(40)])
    value = summarise([table], 0)["prp"].average_increase
    assert value.estimate == 0
    assert 5 < value.high < 12  # Wilson's upper limit of 0 of 40 is 8.8 %


def test_methods_are_compared_image_by_image() -> None:
    drop, increase = method_difference([random_pairs(0, shift=0.05)], 0)
    assert drop.high < 5
    assert drop.low < drop.estimate < drop.high
    assert increase.estimate <= 0
    alone = summarise([random_pairs(0, shift=0.05)], 0)["prp"].average_drop
    assert drop.high - drop.low < alone.high - alone.low


def test_several_training_runs_enter_the_crossed_interval() -> None:
    value = summarise([random_pairs(s) for s in range(3)], 0)["prp"]
    assert value.average_drop.seeds == 3
    with pytest.raises(ValueError, match="different images"):
        summarise([random_pairs(0), random_pairs(1, images=20)], 0)


def test_the_table_by_mixture_has_the_crossed_interval_of_its_seeds() -> None:
    trials = [
        KeyedTable(
            {"task": "t", "trial_id": f"{x}{s}", "h1_share": x, "seed": s}, runs[s].assign(test_set="Test-50-50")
        )
        for x, runs in {0: [random_pairs(s) for s in range(3)], 50: [random_pairs(7)]}.items()
        for s in range(len(runs))
    ]
    table = faithfulness_mixture_table(trials, 0).set_index(["h1_share", "method"])
    wanted = summarise([random_pairs(s) for s in range(3)], 0)["prp"]
    row = table.loc[(0, "prp")]
    assert (row["seeds"], row["n_images"], row["n_pairs"]) == (3, wanted.n_images, wanted.n_pairs)
    assert row["average_drop"] == wanted.average_drop.estimate
    assert (row["average_drop_low"], row["average_drop_high"]) == (wanted.average_drop.low, wanted.average_drop.high)
    assert row["interval"] == "over training runs and patients"
    assert table.loc[(50, "prp"), "interval"] == "conditional on this training run"
