"""A flipped bit or a torn tail in any file of a study: `run` ends with the same bytes, or names file and remedy."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from raystudy.config import Tracking
from raystudy.errors import DamagedFileError, StudyError
from raystudy.explanation import explain_trial
from raystudy.explanation_jobs import job_directory
from raystudy.mirror import Mirror
from raystudy.orchestrate.assignment import FAILED, STOPPED, write_stop
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.films import prepare_films
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.plan import StudyPlan, plan_study
from raystudy.orchestrate.progress import Silent
from raystudy.orchestrate.search import Halving, search_experiment
from raystudy.report.data import read_report_data
from raystudy.report.page import write_report
from raystudy.results import write_sealed
from raystudy.storage import Storage, open_storage
from raystudy.streams import stream
from raystudy.study import Study
from raystudy.trial import TrialInterrupted, run_trial
from tests.faults.conftest import Tally, Undisturbed

FREE = re.compile(r"tiny/(report/.*|trials/[^/]+/events)")  # their bytes are not those of results


@dataclass(frozen=True)
class Place:
    """A storage with one study, and the bytes that it had."""

    root: Path
    plan: StudyPlan
    files: dict[str, bytes]
    tracking: Tracking | None = None  # mirrored and reported, too

    @property
    def storage(self) -> Storage:
        return open_storage(self.root)

    def contents(self) -> dict[str, bytes]:
        return {p.relative_to(self.root).as_posix(): p.read_bytes() for p in self.root.rglob("*") if p.is_file()}

    def restore(self) -> None:
        now = self.contents()
        for name in now.keys() - self.files.keys():
            (self.root / name).unlink()
        for name, data in self.files.items():
            if now.get(name) != data:
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                (self.root / name).write_bytes(data)


def flipped(data: bytes, draw: np.random.Generator) -> bytes:
    at = int(draw.integers(len(data)))
    return data[:at] + bytes([data[at] ^ 1 << int(draw.integers(8))]) + data[at + 1 :]


def torn(data: bytes, draw: np.random.Generator) -> bytes:
    return data[: int(draw.integers(len(data)))]


def kind(name: str) -> str:
    """Name a file without what differs from trial to trial."""
    name = re.sub(r"tiny/trials/[^/]+/", "trial: ", name)
    return re.sub(r"[-_/]?[0-9a-f]{8,}|\d{6,}", "*", name)


def damage_each(place: Place, names: Iterable[str], n: int, seed: int, whole: Callable[[str], None]) -> Counter[str]:
    """Damage file after file n times, flips and tears by turns; see that it is the same, or named with a remedy."""
    outcomes, harms = Counter[str](), itertools.cycle((flipped, torn))
    for name in names:
        draw = stream(seed, "damage", kind(name), name)
        for harm in itertools.islice(harms, n if place.files[name] else 0):
            place.restore()
            (place.root / name).write_bytes(harm(place.files[name], draw))
            look(place)
            refusal = run(place)
            if refusal is None:
                whole(f"{harm.__name__} {name}")
            else:
                assert refusal.where == str(place.root / name), f"{harm.__name__} {name}: {refusal}"
                assert refusal.remedy
            outcomes["same bytes" if refusal is None else "named"] += 1
    return outcomes


def run(place: Place) -> StudyError | None:
    """Run what is missing to a good end, or return the refusal."""
    try:
        outcome = run_study(place.plan, place.storage, executor="plain", **plugs(place))
    except StudyError as error:
        return error
    assert outcome.exit_code == 0
    return None


def plugs(place: Place) -> dict[str, Any]:
    if place.tracking is None:
        return {}
    mirror = Mirror(Study(place.storage.child("tiny")), place.tracking)
    return {"mirror": mirror, "report": lambda study: write_report(study).text()}


def look(place: Place) -> None:
    """Ask for the status as a user would: an answer, or a refusal with a remedy."""
    with contextlib.suppress(DamagedFileError):  # it names the file and the remedy
        Study(place.storage.child("tiny")).require().status()


def read_everything(study: Study) -> None:
    """Read what a report reads."""
    for trial in read_report_data(study).trials:
        assert trial.prototypes
        trial.prototypes.read_bytes("maps.safetensors")


@pytest.fixture(scope="module")
def finished(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = undisturbed.place(tmp_path_factory.mktemp("finished") / "studies", finished=True)
    place = Place(root, plan_study(undisturbed.experiment(root), open_storage(root)), {})
    assert run_study(place.plan, place.storage, executor="plain").trained == 0
    place.files.update(place.contents())
    return place


@pytest.fixture(scope="module")
def begun(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A study of which one trial was interrupted twice in its training, another in its explanation."""
    root = undisturbed.place(tmp_path_factory.mktemp("begun") / "studies", finished=True)
    storage = open_storage(root)
    plan = plan_study(undisturbed.experiment(root), storage)
    training, explaining = plan.trials[1], plan.trials[2]
    study = Study(storage.child("tiny"))
    for trial, part in ((training, ""), (explaining, "explain")):
        shutil.rmtree(Path(study.trial(trial.trial_id).uri) / part)
    Ledger(study, plan).prepare_trials([training])
    films = prepare_films(plan.trials, plan.image_table, storage, Silent()).array(training)
    for polls in (6, 4):  # of seventeen: in the joint stage, in the last layer's
        asked = iter(range(1000))
        with pytest.raises(TrialInterrupted):
            run_trial(
                training.spec, training.cohort, training.tests, films, study.trial(training.trial_id),
                should_stop=lambda asked=asked, polls=polls: next(asked) == polls,
            )  # fmt: skip
    asked = iter(range(1000))
    with pytest.raises(TrialInterrupted):
        explain_trial(
            "prototypes", explaining.spec, explaining.cohort, explaining.tests, films,
            study.trial(explaining.trial_id), explaining.explain, should_stop=lambda: next(asked) == 7,
        )  # fmt: skip
    mark = {"error": "ValueError: told", "attempts": 1, "time": 1.0}
    for trial, path in (
        (training, FAILED),
        (explaining, f"{job_directory('prototypes', explaining.explain)}/{FAILED}"),
    ):
        write_sealed(study.trial(trial.trial_id), path, mark, ())
    write_stop(study, "a user")
    place = Place(root, plan, {})
    place.files.update(place.contents())
    assert len([n for n in place.files if "/checkpoint/" in n]) == 4
    assert any("/chunks/" in n for n in place.files)
    return place


@pytest.fixture(scope="module")
def searched(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A search of two real trials, mirrored and reported, of which it stopped one early."""
    folder = tmp_path_factory.mktemp("searched")
    root = undisturbed.place(folder / "studies")
    storage, study = open_storage(root), Study(open_storage(root).child("tiny"))
    space = {"training.lr_add_on": {"uniform": [1e-3, 2e-3]}}
    search = {"space": space, "trials": 2, "algorithm": "random", "scheduler": "none", "mixtures": [50]}
    asked = undisturbed.experiment(root, [f"search={json.dumps(search)}", "explain.enabled=false"])
    plan = plan_study(search_experiment(asked), storage)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    MlflowClient(tracking_uri=uri).search_experiments()  # makes the tables
    place = Place(root, plan, {}, Tracking(uri=uri))
    assert run_study(plan, storage, executor="plain").trained == 2
    directory = study.trial(study.trial_ids()[1])
    for name in ("result.json", "model.safetensors", "prototypes.parquet", "predictions.parquet"):
        directory.delete(name)
    write_sealed(directory, STOPPED, {"epoch": 1, "value": 55.0, "by": "the search"}, ())
    study.storage.delete("search/observations/000001.json")
    stopped = directory.uri.rsplit("/", 1)[-1]
    assert Halving(study.storage, 3, {stopped}).goes_on(stopped, "cell", 1, 55.0)
    assert run(place) is None
    place.files.update(place.contents())
    kinds = {kind(n) for n in place.files}
    assert kinds >= {f"tiny/{n}" for n in ("report.json", "search/rungs", "search/observations/*.json")}
    assert kinds >= {"trial: stopped.json", "tiny/tracking*.json", "tiny/report/index.html"}
    return place


def damage_searched(place: Place, names: Iterable[str], n: int, seed: int) -> Counter[str]:
    def whole(case: str) -> None:
        now = place.contents()
        different = [k for k in now.keys() | place.files.keys() if now.get(k) != place.files.get(k)]
        assert not [k for k in different if not k.endswith(("events", "/rungs"))], case

    return damage_each(place, names, n, seed, whole)


def beside_the_trials(place: Place) -> list[str]:
    """Return the files of a search, its mirror and its report, and the marks of its trials."""
    return [n for n in sorted(place.files) if re.search(r"/search/|/tracking/|/report|stopped.json|plan.json", n)]


def damage_finished(place: Place, n: int, seed: int, n_trials: int) -> Counter[str]:
    def whole(case: str) -> None:
        now = place.contents()
        different = [k for k in now.keys() | place.files.keys() if now.get(k) != place.files.get(k)]
        assert not [k for k in different if not FREE.fullmatch(k)], case

    trials = [t.trial_id for t in place.plan.trials[:n_trials]]
    names = [m for m in sorted(place.files) if not m.startswith(("_images/squash", "tiny/report/"))]
    return damage_each(place, [m for m in names if "/trials/" not in m or m.split("/")[2] in trials], n, seed, whole)


def damage_begun(place: Place, undisturbed: Undisturbed, names: Iterable[str], n: int, seed: int) -> Counter[str]:
    return damage_each(place, names, n, seed, lambda case: undisturbed.assert_same(place.root))


def of_a_begun_study(place: Place) -> list[str]:
    """Return the files that the rest of a study is made from."""
    return [
        n for n in sorted(place.files)
        if re.search(r"/checkpoint/|/chunks/|/job.json|/cohorts/|_images/|events|spec.json|failed.json|stop.json", n)
        and ("/trials/" not in n or n.split("/")[2] in {t.trial_id for t in place.plan.trials[1:]})
    ]  # fmt: skip


def test_damage_in_any_file_of_a_finished_study_is_mended_or_named(finished: Place, tally: Tally) -> None:
    outcomes = damage_finished(finished, 2, seed=1, n_trials=1)
    tally(f"{outcomes.total()} damages: {dict(outcomes)}")
    assert len(outcomes) == 2


def test_damage_in_what_a_begun_study_goes_on_from_changes_no_byte(
    begun: Place, undisturbed: Undisturbed, tally: Tally
) -> None:
    names = {kind(n): n for n in of_a_begun_study(begun)}  # the newest of each kind
    outcomes = damage_begun(begun, undisturbed, sorted(names.values()), 1, seed=2)
    tally(f"{outcomes.total()} damages: {dict(outcomes)}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own, of its SQLAlchemy
def test_damage_beside_the_trials_of_a_search_is_mended_or_named(searched: Place, tally: Tally) -> None:
    names = {kind(n): n for n in beside_the_trials(searched) if not n.endswith((".svg", ".png"))}
    outcomes = damage_searched(searched, sorted(names.values()), 2, seed=7)
    tally(f"{outcomes.total()} damages: {dict(outcomes)}")
    assert len(outcomes) == 2


@pytest.mark.parametrize("name", ["result.json", "stopped.json"])
def test_a_search_observes_no_damaged_trial(name: str, searched: Place) -> None:
    searched.restore()
    for observation in (searched.root / "tiny" / "search" / "observations").iterdir():
        observation.unlink()
    (file,) = (searched.root / "tiny" / "trials").rglob(name)
    data = file.read_bytes()
    at = re.search(rb'"(val_accuracy|value)": (\d)', data)
    assert at is not None
    file.write_bytes(data[: at.start(2)] + bytes([data[at.start(2)] ^ 1]) + data[at.end(2) :])
    refusal = run(searched)
    assert refusal is not None
    assert refusal.where == str(file)
    observed = [p.read_text() for p in (searched.root / "tiny" / "search" / "observations").iterdir()]
    assert not any(file.parent.name in text for text in observed)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own, of its SQLAlchemy
def test_much_damage_in_every_file(
    finished: Place, begun: Place, searched: Place, undisturbed: Undisturbed, tally: Tally
) -> None:
    outcomes = damage_searched(searched, beside_the_trials(searched), 4, seed=8)
    tally(f"searched study: {outcomes.total()} damages: {dict(outcomes)}")
    outcomes = damage_finished(finished, 8, seed=3, n_trials=3)
    tally(f"finished study: {outcomes.total()} damages: {dict(outcomes)}")
    outcomes = damage_begun(begun, undisturbed, of_a_begun_study(begun), 4, seed=4)
    tally(f"begun study: {outcomes.total()} damages: {dict(outcomes)}")


def test_the_remedy_for_a_damaged_trial_trains_it_to_the_same_bytes(finished: Place, undisturbed: Undisturbed) -> None:
    finished.restore()
    trial = finished.root / "tiny" / "trials" / finished.plan.trials[0].trial_id
    predictions = trial / "predictions.parquet"
    predictions.write_bytes(flipped(predictions.read_bytes(), stream(5, "flip")))
    with pytest.raises(StudyError, match=r"delete result\.json of this trial and run again"):
        run_study(finished.plan, finished.storage, executor="plain")
    (trial / "result.json").unlink()
    assert run_study(finished.plan, finished.storage, executor="plain").trained == 1
    undisturbed.assert_same(finished.root)


@pytest.mark.parametrize(
    "name",
    ["plan.json", "result.json", "predictions.parquet", "pairs.parquet", "specificity.json", "maps.safetensors"],
)
def test_a_report_is_never_made_of_damaged_files(name: str, finished: Place) -> None:
    finished.restore()
    study = Study(finished.storage.child("tiny"))
    file = sorted((finished.root / "tiny").rglob(name))[-1]
    file.write_bytes(flipped(file.read_bytes(), stream(6, name)))
    with pytest.raises(StudyError) as refusal:
        read_everything(study)
    assert refusal.value.where == str(file)
    assert refusal.value.remedy
