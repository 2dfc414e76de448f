import shutil
from pathlib import Path

import pytest

from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.films import Films, plan_readable
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.progress import Silent
from raystudy.storage import open_storage
from tests.orchestrate import tiny, works
from tests.orchestrate.test_watch import Kept


def test_a_film_that_a_plan_does_without_is_counted_as_quarantined(tmp_path: Path, ray_local: None) -> None:
    root = open_storage(tmp_path / "studies")
    tiny.make_films(tmp_path)
    experiment = tiny.experiment(tmp_path, tmp_path / "studies", ["images.unreadable=drop"])
    drawn = plan_study(experiment, root).image_table.iloc[0]
    Path(drawn["uri"]).write_bytes(b"no film")
    plan = plan_readable(experiment, root, Silent())
    assert plan.unusable == {drawn["image_id"]}
    assert Films(left_out=len(plan.unusable)).quarantined == 1


def test_the_share_of_films_in_quarantine_is_the_study_s_whatever_a_run_still_has_to_do(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raystudy.orchestrate.metrics.Gauge", Kept)
    root = open_storage(tmp_path / "studies")
    tiny.make_films(tmp_path)
    experiment = tiny.experiment(tmp_path, tmp_path / "studies", ["images.unreadable=drop"])
    Path(plan_study(experiment, root).image_table.iloc[0]["uri"]).write_bytes(b"no film")
    plan = plan_readable(experiment, root, Silent())
    films = {i for t in plan.trials for frame in (t.cohort, t.tests) for i in frame["image_id"]}
    for to_do in (3, 1):
        monkeypatch.setattr(Kept, "values", {})
        assert run_study(plan, root, work=works.null).trained == to_do
        assert Kept.values["raystudy_quarantined_images"] == 1
        assert Kept.values["raystudy_images"] == len(films) + 1
        shutil.rmtree(tmp_path / "studies" / "tiny" / "trials" / plan.trials[1].trial_id)
