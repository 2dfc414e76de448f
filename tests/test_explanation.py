"""Explaining a finished trial: resumable, sharding-invariant, the same bytes every time (method.md c, d, e 19, 20)."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch

from raystudy.evaluate.faithfulness import METHODS, average_drop, average_increase, summarise
from raystudy.explanation import explain_trial
from raystudy.explanation_faithfulness import balanced_order, faithfulness_test_set, look, masked_scores, positive_share
from raystudy.explanation_jobs import JOBS, explained, job_directory
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.array import ImageArray
from raystudy.protopnet.normalise import normalise
from raystudy.protopnet.settings import ModelSettings, TrainingSettings
from raystudy.relevance import PrototypeExplainer, upsample_activation
from raystudy.storage import Storage, open_storage
from raystudy.trial import TrialInterrupted, TrialSpec, load_model, run_trial
from tests.golden_vectors import Golden

SIZE = 48
SETTINGS = ExplainSettings(adai_images=10, top_k=3)


def films() -> tuple[pd.DataFrame, pd.DataFrame, ImageArray]:
    """Forty training, eight validation and twelve test films a cell; positives are brighter on the left."""
    rng = np.random.default_rng(0)
    rows, pixels = [], []
    for role, count in (("train", 10), ("val", 3), ("test", 6)):
        for source in ("H1", "H2"):
            for label in (0, 1):
                for i in range(count):
                    film = rng.integers(40, 120, (SIZE, SIZE))
                    film[8:24, 4:20] += 90 * label
                    if source == "H1":
                        film[:6, -12:] = 250
                    pixels.append(film.astype(np.uint8))
                    name = f"{source}/{role}-{label}-{i}.png"
                    rows.append((name, f"{source}:{role}{label}{i // 2}", source, label, role))
    table = pd.DataFrame(rows, columns=["image_id", "patient_id", "source", "label", "role"])
    cohort = table[table["role"] != "test"].reset_index(drop=True)
    test = table[table["role"] == "test"].drop(columns="role")
    agrees = (test["source"] == "H1") == (test["label"] == 1)
    sets = [("Test-100H1", test[agrees]), ("Test-100H2", test[~agrees]), ("Test-50-50", test)]
    tests = pd.concat([rows.assign(test_set=name) for name, rows in sets], ignore_index=True)
    return cohort, tests, ImageArray(tuple(table["image_id"]), np.stack(pixels))


@dataclasses.dataclass(frozen=True)
class Finished:
    spec: TrialSpec
    cohort: pd.DataFrame
    tests: pd.DataFrame
    images: ImageArray
    files: dict[str, bytes]

    def storage(self, folder: Path) -> Storage:
        """Return a fresh copy of the trial's directory."""
        storage = open_storage(folder)
        for name, data in self.files.items():
            storage.write_bytes(name, data)
        return storage

    def explain(self, job, storage, settings=SETTINGS, **options) -> Storage:
        inputs = {"cohort": self.cohort, "tests": self.tests, "images": self.images, "spec": self.spec} | options
        given = [inputs.pop(name) for name in ("spec", "cohort", "tests", "images")]
        explain_trial(job, *given, storage, settings, **inputs)
        return storage.child(*job_directory(job, settings).split("/"))


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    cohort, tests, images = films()
    training = TrainingSettings(
        epochs=8,
        warm_epochs=2,
        projection_interval=8,
        last_layer_epochs=1,
        batch_size=8,
        lr_backbone=1e-3,
        lr_add_on=1e-4,
        lr_warm_add_on=1e-4,  # at the paper's rate the small add-on dies: maps without relevance
    )
    model = ModelSettings("resnet18", "none", prototypes_per_class=3, prototype_dim=128, backbone_layers=3)
    spec = TrialSpec(
        study="s",
        trial_id="t",
        task="pneumonia",
        class_names=("healthy", "pneumonia"),
        h1_share=50,
        seed=0,
        cohort_seed=0,
        study_seed=7,
        model=model,
        training=training,
        image_size=SIZE,
        cohort_sha256="0" * 64,
        numerics_version=1,
    )
    storage = open_storage(tmp_path_factory.mktemp("trial"))
    run_trial(spec, cohort, tests, images, storage)
    return Finished(spec, cohort, tests, images, {name: storage.read_bytes(name) for name in storage.list()})


def contents(directory: Storage) -> dict[str, bytes]:
    return {name: directory.read_bytes(name) for name in directory.list()}


@pytest.fixture(scope="module")
def done(trial: Finished, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of both jobs, computed in one go."""
    storage = trial.storage(tmp_path_factory.mktemp("done"))
    return {job: contents(trial.explain(job, storage)) for job in JOBS}


def table(data: bytes) -> pd.DataFrame:
    return pq.read_table(io.BytesIO(data)).to_pandas()


def test_pairs_hold_every_image_method_and_unique_prototype_of_the_predicted_class(trial, done) -> None:
    pairs = table(done["faithfulness"]["pairs.parquet"])
    assert list(pairs.columns) == [
        *("image_id", "patient_id", "source", "test_set", "prototype", "multiplicity", "method", "draw"),
        *("score", "score_masked"),
    ]
    assert set(pairs["method"]) == set(METHODS)
    assert set(pairs["test_set"]) == {"Test-50-50"}
    assert pairs["image_id"].nunique() == 10
    assert (pairs.groupby(["image_id", "method"])["multiplicity"].sum() == 3).all()
    assert (pairs["score"] > 0).all()
    predicted = table(trial.files["predictions.parquet"]).drop_duplicates("image_id").set_index("image_id")["predicted"]
    assert (pairs["prototype"] // 3 == pairs["image_id"].map(predicted)).all()
    facts = json.loads(done["faithfulness"]["done.json"])
    assert (facts["n_images"], facts["n_images_available"], facts["n_pairs"]) == (10, 24, 30)
    assert summarise([pairs], 7)["prp"].n_pairs == 30


@pytest.mark.parametrize("chunk", [1, 3])
def test_pairs_do_not_depend_on_chunks_or_on_the_order_of_the_tables(trial, done, tmp_path, chunk) -> None:
    shuffled = trial.tests.sample(frac=1, random_state=1)
    order = np.random.default_rng(0).permutation(len(trial.images.image_ids))
    images = ImageArray(tuple(trial.images.image_ids[i] for i in order), trial.images.pixels[order])
    files = contents(trial.explain("faithfulness", trial.storage(tmp_path), tests=shuffled, images=images, chunk=chunk))
    assert files["pairs.parquet"] == done["faithfulness"]["pairs.parquet"]


def test_an_image_has_the_same_numbers_whichever_other_images_there_are(trial, done, tmp_path) -> None:
    fewer = dataclasses.replace(SETTINGS, adai_images=4)
    pairs = table(contents(trial.explain("faithfulness", trial.storage(tmp_path), fewer))["pairs.parquet"])
    every = table(done["faithfulness"]["pairs.parquet"])
    same = every[every["image_id"].isin(set(pairs["image_id"]))].reset_index(drop=True)
    pd.testing.assert_frame_equal(pairs, same)


@pytest.mark.parametrize("job", JOBS)
def test_a_stopped_job_goes_on_and_leaves_the_same_bytes(trial, done, tmp_path, job) -> None:
    storage = trial.storage(tmp_path)
    asked = 0
    for allowed in (1, 3, 4, 10_000):
        steps = 0

        def should_stop(allowed: int = allowed) -> bool:
            nonlocal steps
            steps += 1
            return steps > allowed

        try:
            place = trial.explain(job, storage, should_stop=should_stop, chunk=2)
        except TrialInterrupted:
            asked += 1
            assert not explained(job, storage, SETTINGS)
    assert asked == 3
    assert explained(job, storage, SETTINGS)
    assert contents(place) == done[job]


def test_a_resumed_job_computes_only_the_missing_pieces(trial, tmp_path) -> None:
    storage = trial.storage(tmp_path)
    steps = []
    with pytest.raises(TrialInterrupted):
        trial.explain("faithfulness", storage, chunk=2, should_stop=lambda: steps.append(1) or len(steps) > 9)
    kept = [n for n in storage.list() if "/chunks/" in n]
    assert len(kept) == 3  # of five pieces: a check before each piece and before each image
    later: list[int] = []
    seen: list[tuple[int, int]] = []
    trial.explain(
        "faithfulness",
        storage,
        chunk=2,
        should_stop=lambda: bool(later.append(1)),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(later) == 2 * 3
    assert seen[-1] == (10, 10)
    later.clear()
    trial.explain("faithfulness", storage, should_stop=lambda: bool(later.append(1)))
    assert not later  # a done job is left alone


def test_pieces_of_another_trial_are_thrown_away(trial, done, tmp_path) -> None:
    storage = trial.storage(tmp_path)
    place = storage.child(*job_directory("faithfulness", SETTINGS).split("/"))
    place.write_json("job.json", {"trial": "another"})
    place.write_bytes("chunks/pairs-000000-000010", b"[]")
    assert contents(trial.explain("faithfulness", storage)) == done["faithfulness"]


def test_settings_that_a_job_does_not_read_share_its_directory() -> None:
    base = ExplainSettings()
    assert job_directory("faithfulness", base) == job_directory("faithfulness", dataclasses.replace(base, top_k=9))
    assert job_directory("prototypes", base) != job_directory("prototypes", dataclasses.replace(base, top_k=9))
    assert job_directory("faithfulness", base) != job_directory("faithfulness", dataclasses.replace(base, l2_power=4))
    with pytest.raises(ValueError, match="job must be one of"):
        job_directory("magic", base)


def test_test_set_of_ad_and_ai_follows_the_share() -> None:
    assert [faithfulness_test_set(x) for x in (0, 49, 50, 51, 100)] == [
        *("Test-100H2", "Test-100H2", "Test-50-50", "Test-100H1", "Test-100H1")
    ]


def test_every_prefix_of_the_image_order_is_balanced_and_seeded(trial) -> None:
    rows = trial.tests[trial.tests["test_set"] == "Test-50-50"]
    order = balanced_order(rows, 7, "pneumonia")
    assert sorted(order["image_id"]) == sorted(rows["image_id"])
    for n in range(1, len(order) + 1):
        counts = (
            order.head(n)
            .groupby(["source", "label"])
            .size()
            .reindex(pd.MultiIndex.from_product([["H1", "H2"], [0, 1]]))
        )
        assert counts.fillna(0).max() - counts.fillna(0).min() <= 1
    again = balanced_order(rows.sample(frac=1, random_state=0), 7, "pneumonia")
    assert list(order["image_id"]) == list(again["image_id"])
    assert list(order["image_id"]) != list(balanced_order(rows, 8, "pneumonia")["image_id"])


def test_prototypes_keep_their_sources_maps_and_multiplicities(trial, done, tmp_path) -> None:
    files = done["prototypes"]
    unique = table(files["unique.parquet"])
    record = table(trial.files["prototypes.parquet"]).set_index("prototype")
    assert unique["multiplicity"].sum() == 6
    assert (unique["image_id"].to_numpy() == record.loc[unique["prototype"], "image_id"].to_numpy()).all()
    assert unique["at_source_cell"].all()
    maps = safetensors.numpy.load(files["maps.safetensors"])
    assert maps["prp"].shape == (len(unique), SIZE, SIZE)
    assert maps["activation"].shape == (len(unique), 3, 3)
    assert maps["prp"].sum(axis=(1, 2)) == pytest.approx(np.ones(len(unique)), abs=1e-3)  # unit seed
    model = load_model(trial.storage(tmp_path))
    first = unique.iloc[0]
    film = torch.from_numpy(trial.images.take([first["image_id"]]))
    alone = PrototypeExplainer(model)(normalise(film), torch.tensor([[int(first["prototype"])]])).maps[0, 0].numpy()
    # At a source rounding decides the channel weights (method.md b.4): maps agree to 1e-2 of their maximum (e.4).
    assert np.abs(maps["prp"][0] - alone).max() <= 1e-2 * np.abs(alone).max()


def test_class_maps_have_largest_magnitude_one_and_are_the_mean_of_displayed_maps(done) -> None:
    files = done["prototypes"]
    unique = table(files["unique.parquet"])
    maps = safetensors.numpy.load(files["maps.safetensors"])["prp"]
    class_maps = safetensors.numpy.load(files["class_maps.safetensors"])
    for label in (0, 1):
        own = maps[unique["class"] == label]
        mean = (own / np.abs(own).max(axis=(1, 2), keepdims=True)).mean(axis=0)
        assert np.allclose(class_maps[f"class_{label}"], mean / np.abs(mean).max(), atol=1e-6)


def test_class_maps_are_superimposed_as_the_settings_say(trial, done, tmp_path) -> None:
    settings = dataclasses.replace(SETTINGS, superposition="maximum")
    files = contents(trial.explain("prototypes", trial.storage(tmp_path), settings))
    assert json.loads(files["done.json"])["superposition"] == "maximum"
    maps, unique = safetensors.numpy.load(files["maps.safetensors"])["prp"], table(files["unique.parquet"])
    for label, found in ((c, safetensors.numpy.load(files["class_maps.safetensors"])[f"class_{c}"]) for c in (0, 1)):
        own = maps[unique["class"] == label]
        assert np.allclose(found, (own / np.abs(own).max(axis=(1, 2), keepdims=True)).max(axis=0), atol=1e-6)
    assert files["maps.safetensors"] == done["prototypes"]["maps.safetensors"]


def test_the_most_activated_training_image_of_a_prototype_is_its_source(trial, done) -> None:
    files = done["prototypes"]
    top = table(files["top_k.parquet"])
    first = top[top["rank"] == 1]
    assert first["is_source"].all()
    assert (first["distance"] <= 5e-5).all()
    assert top.groupby("prototype")["distance"].apply(lambda d: d.diff().min()).min() >= -5e-5
    assert set(top["image_id"]) <= set(trial.cohort.loc[trial.cohort["role"] == "train", "image_id"])
    maps = safetensors.numpy.load(files["top_k_maps.safetensors"])["prp"]
    assert maps.shape == (top["prototype"].nunique(), 3, SIZE, SIZE)
    assert np.abs(maps).max(axis=(2, 3)) == pytest.approx(1)


def test_specificity_is_reported_for_every_rule_set_with_its_n(done) -> None:
    report = json.loads(done["prototypes"]["specificity.json"])
    assert {"published", "separating"} <= set(report)
    for numbers in report.values():
        assert numbers["n_shuffled"] > 0
        assert numbers["n_same_cell"] > 0
        assert -1 <= numbers["shuffled"] <= 1
        assert numbers["conservation"] == pytest.approx(1, abs=1e-2)
    assert report["separating"]["shuffled"] < report["published"]["shuffled"]


def test_positive_relevance_inside_truth_masks_is_written_beside_the_area(trial, done, tmp_path) -> None:
    tag = np.zeros((SIZE, SIZE), bool)
    tag[:6, -12:] = True
    masks = {name: {"tag": tag} for name in trial.images.image_ids}
    storage = trial.storage(tmp_path)
    shares = table(contents(trial.explain("faithfulness", storage, masks=masks))["mask_share.parquet"])
    pairs = table(done["faithfulness"]["pairs.parquet"])
    assert len(shares) == (pairs["method"] != "random").sum()
    assert shares["area_share"].to_numpy() == pytest.approx(72 / SIZE**2)
    assert shares["positive_share"].between(0, 1).all()
    own = table(contents(trial.explain("prototypes", storage, masks=masks))["mask_share.parquet"])
    assert set(own["mask"]) == {"tag"}


def test_share_of_positive_relevance_ignores_negative_values() -> None:
    maps = np.array([[[3.0, -5.0], [1.0, 0.0]], [[-1.0, -1.0], [0.0, 0.0]]])
    inside = np.array([[True, True], [False, False]])
    shares = positive_share(maps, inside)
    assert shares[0] == 0.75
    assert np.isnan(shares[1])
    with pytest.raises(ValueError, match="does not fit"):
        positive_share(maps, np.zeros((3, 3), bool))


def test_more_draws_keep_the_first_and_change_only_the_noise(trial, done, tmp_path) -> None:
    settings = dataclasses.replace(SETTINGS, adai_draws=2)
    pairs = table(contents(trial.explain("faithfulness", trial.storage(tmp_path), settings))["pairs.parquet"])
    first = pairs[pairs["draw"] == 0].reset_index(drop=True)
    one = table(done["faithfulness"]["pairs.parquet"])
    pd.testing.assert_frame_equal(first[["image_id", "method", "prototype", "score"]], one[first.columns[[0, 6, 4, 8]]])
    second = pairs[pairs["draw"] == 1].reset_index(drop=True)
    assert (second["score"] == first["score"]).all()
    assert not (second["score_masked"] == first["score_masked"]).all()


def test_explaining_needs_a_finished_trial_and_its_image_size(trial, tmp_path) -> None:
    with pytest.raises(ValueError, match="finished"):
        trial.explain("faithfulness", open_storage(tmp_path / "empty"))
    small = ImageArray(trial.images.image_ids, np.ascontiguousarray(trial.images.pixels[:, :32, :32]))
    with pytest.raises(ValueError, match="48 px"):
        trial.explain("faithfulness", trial.storage(tmp_path / "small"), images=small)
    with pytest.raises(ValueError, match="Test-50-50"):
        trial.explain("faithfulness", trial.storage(tmp_path / "none"), tests=trial.tests.head(3))


def test_explaining_leaves_threads_and_global_generators_alone(trial, tmp_path) -> None:
    before = torch.get_num_threads(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    trial.explain("faithfulness", trial.storage(tmp_path), dataclasses.replace(SETTINGS, adai_images=1))
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
    assert torch.is_grad_enabled()


class KeepsTheCorner(torch.nn.Module):
    """A toy scorer of one prototype that looks at nothing but the brightest quarter of the picture."""

    def features(self, images: torch.Tensor, *, finite: bool):
        assert finite
        return images

    def compare(self, images: torch.Tensor):
        score = images[:, :, :8, :8].mean((1, 2, 3)).unsqueeze(1) + 3
        return type("Output", (), {"similarities": score})()

    def forward(self, images: torch.Tensor):
        return self.compare(images)


def test_a_map_that_keeps_all_that_counts_has_no_drop() -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    right, wrong = np.zeros((2, 1, 16, 16))
    right[0, :8, :8], wrong[0, 8:, 8:] = 1, 1
    rng = np.random.default_rng(0)
    noise = np.zeros((3, 16, 16), np.float32)
    after = masked_scores(
        KeepsTheCorner().eval(), image, [0], {"right": right, "wrong": wrong}, rng.random((16, 16)), noise
    )
    before = KeepsTheCorner()(image[None]).similarities.numpy()[0]
    assert average_drop(before, after["right"]) == 0
    assert average_drop(before, after["wrong"]) > 5


@pytest.mark.golden
def test_ad_and_ai_equal_the_golden_numbers_with_given_ties_and_noise(
    golden: Callable[[str], Golden], golden_recipe: ModuleType
) -> None:
    arrays, model, films = golden("adai_r18")
    explainer = PrototypeExplainer(model)
    score, masked = [], {"prp": [], "protopnet": []}
    with torch.no_grad():
        for i, film in enumerate(films):
            seen = look(model, film)
            assert seen.predicted == arrays["predicted"][i]
            chosen = list(range(10 * seen.predicted, 10 * seen.predicted + 10))
            maps = {
                "prp": explainer(film[None], torch.tensor([chosen])).maps[0].numpy(),
                "protopnet": upsample_activation(seen.activation[chosen], (224, 224)).numpy(),
            }
            ties = golden_recipe.uniform(int(arrays["seed"]), f"tie{i}", 50176).reshape(224, 224)
            noise = np.repeat(arrays["noise"][i][None], 3, axis=0)
            after = masked_scores(model, film, chosen, maps, ties, noise)
            score.append(seen.similarities[chosen].numpy())
            for method, values in after.items():
                masked[method].append(values)
    s = np.stack(score)
    np.testing.assert_allclose(s, arrays["score"], rtol=1e-5)
    for at, method in enumerate(("prp", "protopnet")):
        o = np.stack(masked[method])
        np.testing.assert_allclose(o, arrays[f"score_masked_{method}"], rtol=2e-3)
        assert average_drop(s, o) == pytest.approx(arrays["ad"][at], abs=0.1)
        assert average_increase(s, o) == pytest.approx(arrays["ai"][at], abs=100 / 30 + 1e-9)  # one pair
