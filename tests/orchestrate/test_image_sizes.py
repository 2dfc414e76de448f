from pathlib import Path

from raystudy.images.store import size_of
from raystudy.study import Study
from tests.orchestrate import tiny, works


def test_a_study_keeps_the_films_of_every_size_that_its_plan_asks_for(films: Path, place: Path) -> None:
    study = Study.at(str(place), "tiny")

    def sizes_after(*sizes: int, trained: int) -> list[int]:
        axis = ["mixtures=[50]", f"axes={{images.size: {list(sizes)}}}"]
        assert tiny.run(films, place, axis, works.null, executor="plain").trained == trained
        return [size_of(key) for key in study.image_keys() or ()]

    assert sizes_after(32, trained=1) == [32]
    assert sizes_after(32, 48, trained=1) == [32, 48]  # what is new has films of its own
    plan, _ = tiny.planned(films, place, ["mixtures=[50]", "axes={images.size: [32, 48]}"])
    last = plan.trials[1]
    study.trial(last.trial_id).delete("result.json")
    assert sizes_after(32, 48, trained=1) == [32, 48]  # what is finished does not take part
    ids = last.cohort["image_id"].tolist()
    assert [study.films(ids, size).pixels.shape[1] for size in (32, 48)] == [32, 48]

    assert sizes_after(48, 64, trained=1) == [48, 64]
    assert sizes_after(32, 48, 64, trained=0) == [32, 48, 64]  # finished long ago, and its films were forgotten


def test_films_of_a_changed_table_take_the_place_of_those_before(films: Path, place: Path) -> None:
    study = Study.at(str(place), "tiny")
    more = ["axes={images.size: [32, 48]}"]
    tiny.run(films, place, ["mixtures=[50]", *more], works.null, executor="plain")
    before = study.image_keys() or []
    tiny.run(films, place, ["mixtures=[0, 50, 100]", *more], works.null, executor="plain")
    after = study.image_keys() or []
    assert [size_of(key) for key in after] == [32, 48]
    assert not {*before} & {*after}


def test_a_setting_that_moves_no_pixel_leaves_the_films_of_a_finished_study_alone(films: Path, place: Path) -> None:
    tiny.run(films, place, ["mixtures=[50]"], works.null, executor="plain")
    kept = place / "tiny" / "images.json"
    before = kept.stat().st_mtime_ns
    tiny.run(films, place, ["mixtures=[50]", "images.pixel_cap=1000000"], works.null, executor="plain")
    assert kept.stat().st_mtime_ns == before
