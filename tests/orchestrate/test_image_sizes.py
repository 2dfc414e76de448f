from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from raystudy.images.settings import ImageSettings
from raystudy.images.store import size_of
from raystudy.orchestrate.driver import run_study
from raystudy.report import single
from raystudy.report.single import explain_images
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
    assert [study.films(ids, size, {}).pixels.shape[1] for size in (32, 48)] == [32, 48]

    assert sizes_after(48, 64, trained=1) == [48, 64]
    assert sizes_after(32, 48, 64, trained=0) == [32, 48, 64]  # finished long ago, and its films were forgotten


def test_a_trial_is_explained_on_films_that_are_resized_as_its_own_were(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    films = tiny.make_films(tmp_path)
    for path in (films / "films").iterdir():
        Image.open(path).resize((48, 24)).save(path)
    study = Study.at(str(tmp_path / "studies"), "tiny")
    two = ["mixtures=[50]", "axes={images.resize: [letterbox, squash]}"]
    plan, storage = tiny.planned(films, tmp_path / "studies", two)
    assert run_study(plan, storage, executor="plain").explained == 4
    ids = plan.trials[0].cohort["image_id"].tolist()
    seen = {r: study.films(ids, 32, {"images.resize": r}).pixels for r in ("letterbox", "squash")}
    assert [bool(pixels[:, 0].any()) for pixels in seen.values()] == [False, True]  # bars above and below, or none
    assert (study.films(ids, 32, {}).pixels == seen["squash"]).all()  # as the experiment says
    shown: list[NDArray[np.uint8]] = []
    monkeypatch.setattr(single, "_panel", lambda _, film, *others: shown.append(film) or Figure())
    for trial, wanted in zip(plan.trials, seen.values(), strict=True):
        both = [ids[0], str(films / "films" / ids[0].rpartition("/")[2])]  # of the study, and decoded anew
        assert len([*explain_images(study, trial.trial_id, both, trial.explain, ImageSettings(size=64))]) == 2
        assert all((film == wanted[0]).all() for film in (shown.pop(), shown.pop()))


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
