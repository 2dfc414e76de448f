from pathlib import Path

from raystudy.orchestrate.films import Films, plan_readable
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.progress import Silent
from raystudy.storage import open_storage
from tests.orchestrate import tiny


def test_a_film_that_a_plan_does_without_is_counted_as_quarantined(tmp_path: Path, ray_local: None) -> None:
    root = open_storage(tmp_path / "studies")
    tiny.make_films(tmp_path)
    experiment = tiny.experiment(tmp_path, tmp_path / "studies", ["images.unreadable=drop"])
    drawn = plan_study(experiment, root).image_table.iloc[0]
    Path(drawn["uri"]).write_bytes(b"no film")
    plan = plan_readable(experiment, root, Silent())
    assert plan.unusable == {drawn["image_id"]}
    assert Films(left_out=len(plan.unusable)).quarantined == 1
