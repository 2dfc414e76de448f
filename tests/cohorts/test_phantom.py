"""Phantom hospitals: deterministic by id, planted truth where it says, no signal where there is none."""

import io
import subprocess
import sys
import time
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image

from raystudy.cohorts.phantom import (
    draw_film,
    films_storage,
    masks,
    missing_films,
    phantom_table,
    write_films,
)
from raystudy.cohorts.phantom_settings import NO_FINDING, SIGNS, PhantomSettings
from raystudy.cohorts.vocabulary import canonical_finding
from raystudy.errors import StudyError
from raystudy.images.decode import decode_film
from raystudy.images.settings import ImageSettings
from raystudy.storage import Storage, open_storage

SMALL = PhantomSettings(patients=12, size=64)


@pytest.fixture
def root(tmp_path) -> Storage:
    return open_storage(tmp_path)


def ids_with(settings: PhantomSettings, finding: str, n: int) -> list[str]:
    table = phantom_table(settings, "H1", open_storage("anywhere"))
    return table.loc[[f == [finding] for f in table["findings"]], "image_id"].tolist()[:n]


def test_table_has_canonical_columns_unique_ids_and_findings_of_the_vocabulary(root):
    table = phantom_table(PhantomSettings(patients=300), "H1", root)
    assert list(table.columns) == [
        *("image_id", "source", "patient_id", "uri", "view", "findings", "uncertain", "split"),
    ]
    assert table["image_id"].is_unique
    assert table["patient_id"].nunique() == 300
    assert table["patient_id"].str.startswith("H1:").all()
    assert {f for row in table["findings"] for f in row} == {*SIGNS, NO_FINDING}
    assert all(canonical_finding(f) is not None for f in (*SIGNS, NO_FINDING))


def test_shares_of_patients_follow_the_settings(root):
    table = phantom_table(PhantomSettings(patients=2000, pneumonia_share=0.2, healthy_share=0.5), "H1", root)
    by_patient = table.drop_duplicates("patient_id")["findings"].str[0].value_counts(normalize=True)
    # three standard errors of a share of one half in 2000 patients are 0.034
    assert by_patient["Pneumonia"] == pytest.approx(0.2, abs=0.034)
    assert by_patient[NO_FINDING] == pytest.approx(0.5, abs=0.034)


def test_a_film_depends_on_its_id_alone_and_not_on_order_or_company():
    table = phantom_table(SMALL, "H1", open_storage("anywhere"))
    ids = table["image_id"].tolist()
    forwards = {i: draw_film(SMALL, "H1", i).pixels for i in ids}
    backwards = {i: draw_film(SMALL, "H1", i).pixels for i in reversed(ids)}
    larger = PhantomSettings(patients=13, size=64)  # one more patient changes nobody else
    assert all(np.array_equal(forwards[i], backwards[i]) for i in ids)
    assert all(np.array_equal(forwards[i], draw_film(larger, "H1", i).pixels) for i in ids)


def test_the_same_id_in_another_source_or_seed_is_another_film():
    one = draw_film(SMALL, "H1", "H1/p00000_00.png").pixels
    assert not np.array_equal(one, draw_film(SMALL, "H2", "H2/p00000_00.png").pixels)
    other_seed = PhantomSettings(patients=12, size=64, seed=1)
    assert not np.array_equal(one, draw_film(other_seed, "H1", "H1/p00000_00.png").pixels)


def test_films_of_a_patient_are_more_alike_than_films_of_two_patients():
    plain = PhantomSettings(patients=60, size=96, tag_visibility=0, collimation=0, gain=0, noise=0, sign_strength=0)
    table = phantom_table(plain, "H1", open_storage("anywhere"))
    counts = table.groupby("patient_id").size()
    patients = [p.removeprefix("H1:") for p in counts[counts >= 2].index][:20]
    films = {(p, k): draw_film(plain, "H1", f"H1/{p}_{k:02d}.png").pixels.ravel() for p in patients for k in (0, 1)}
    within = [np.corrcoef(films[p, 0], films[p, 1])[0, 1] for p in patients]
    between = [
        np.corrcoef(films[p, 0], films[q, 1])[0, 1] for p, q in zip(patients, patients[1:] + patients[:1], strict=True)
    ]
    assert np.median(within) > np.median(between)
    assert max(within) < 1  # the pose differs


@pytest.mark.parametrize("finding", SIGNS)
def test_the_sign_mask_is_where_films_with_and_without_the_sign_differ(finding):
    sick = PhantomSettings(patients=120, size=96, noise=0, tag_visibility=0)
    sound = PhantomSettings(patients=120, size=96, noise=0, tag_visibility=0, sign_strength=0)
    for image_id in ids_with(sick, finding, 5):
        film, without = draw_film(sick, "H1", image_id), draw_film(sound, "H1", image_id)
        change = np.abs(film.pixels.astype(int) - without.pixels.astype(int))
        assert 0.003 < film.sign.mean() < 0.35
        assert not without.sign.any()
        assert change[film.sign].mean() > 5 * change[~film.sign].mean()
        assert change.max() < 120  # grey levels: weak beside the text, which is near white


def test_films_without_a_finding_have_no_sign():
    healthy = PhantomSettings(patients=60, size=64)
    assert not any(masks(healthy, "H1", i).sign.any() for i in ids_with(healthy, NO_FINDING, 10))


@pytest.mark.parametrize(("look", "right_half"), [("north", True), ("south", False)])
def test_the_tag_mask_is_where_films_with_and_without_text_differ_at_the_usual_place(look, right_half):
    text = PhantomSettings(look=look, patients=30, size=128)
    blank = PhantomSettings(look=look, patients=30, size=128, tag_visibility=0)
    for number in range(30):
        image_id = f"H1/p{number:05d}_00.png"
        film, without = draw_film(text, "H1", image_id), draw_film(blank, "H1", image_id)
        change = np.abs(film.pixels.astype(int) - without.pixels.astype(int))
        assert change[~film.tag].max() < 60  # the rim of a letter, below the mask's threshold
        assert 0.002 < film.tag.mean() < 0.06
        assert not without.tag.any()
        columns = np.flatnonzero(film.tag.any(axis=0))
        assert (columns.min() >= 64) == right_half
        assert (columns.max() < 64) == (not right_half)
        assert film.tag[:2].sum() == film.tag[-2:].sum() == 0  # nothing cut off


def test_tags_go_along_with_the_finding_as_much_as_the_settings_say():
    settings = PhantomSettings(patients=400, films_per_patient=1, size=64, tag_share=0.5, tag_association=0.6)
    table = phantom_table(settings, "H1", open_storage("anywhere"))
    sick = np.array([f == ["Pneumonia"] for f in table["findings"]])
    tagged = np.array([masks(settings, "H1", i).tag.any() for i in table["image_id"]])
    # standard error of the difference: sqrt(0.16/136 + 0.16/264) = 0.042
    assert tagged[sick].mean() - tagged[~sick].mean() == pytest.approx(0.6, abs=0.13)


def test_originals_are_written_once_and_only_the_missing_ones_again(root):
    wanted = phantom_table(SMALL, "H1", root)["image_id"].tolist()
    assert write_films(SMALL, "H1", root) == len(wanted)
    assert missing_films(SMALL, "H1", root, wanted) == []
    assert write_films(SMALL, "H1", root) == 0
    home = films_storage(SMALL, "H1", root)
    lost = home.list()[3]
    before = home.read_bytes(lost)
    home.delete(lost)
    assert write_films(SMALL, "H1", root) == 1
    assert home.read_bytes(lost) == before


def test_only_films_that_are_asked_for_are_written_and_other_settings_live_elsewhere(root):
    assert write_films(SMALL, "H1", root, ["H1/p00003_00.png"]) == 1
    assert films_storage(SMALL, "H1", root).list() == ["p00003_00.png"]
    fainter = PhantomSettings(patients=12, size=64, tag_visibility=0.5)
    assert missing_films(fainter, "H1", root, ["H1/p00003_00.png"]) == ["H1/p00003_00.png"]


def test_an_original_is_read_back_by_the_decoder_of_all_films(root):
    write_films(SMALL, "H1", root, ["H1/p00003_00.png"])
    data = films_storage(SMALL, "H1", root).read_bytes("p00003_00.png")
    pixels = decode_film(data, "p00003_00.png", ImageSettings(size=64))
    assert np.array_equal(pixels, draw_film(SMALL, "H1", "H1/p00003_00.png").pixels)


def test_two_processes_write_the_bytes_of_one(tmp_path):
    settings = PhantomSettings(patients=150, size=64)
    one, two = open_storage(tmp_path / "one"), open_storage(tmp_path / "two")
    told: list[tuple[int, int]] = []
    assert write_films(settings, "H1", one) == write_films(
        settings, "H1", two, workers=2, progress=lambda done, of: told.append((done, of))
    )
    assert told[-1][0] == told[-1][1] > 256  # more than FEW: the second process was really there
    a, b = films_storage(settings, "H1", one), films_storage(settings, "H1", two)
    assert a.list() == b.list()
    assert all(a.read_bytes(name) == b.read_bytes(name) for name in a.list())


WRITER = """
import sys
from raystudy.cohorts.phantom import write_films
from raystudy.cohorts.phantom_settings import PhantomSettings
from raystudy.storage import open_storage
write_films(PhantomSettings(patients=300, size=64), "H1", open_storage(sys.argv[1]))
"""


def test_a_writer_killed_at_any_moment_leaves_only_whole_films(root):
    settings = PhantomSettings(patients=300, size=64)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, root.uri])
    home = films_storage(settings, "H1", root)
    deadline = time.monotonic() + 60
    while len(home.list()) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.kill()
    writer.wait()
    done = home.list()
    assert 20 <= len(done) < 600
    for name in done:
        pixels = np.asarray(Image.open(io.BytesIO(home.read_bytes(name))))
        assert np.array_equal(pixels, draw_film(settings, "H1", f"H1/{name}").pixels)
    wanted = [f"H1/p{n:05d}_00.png" for n in range(300)]
    assert write_films(settings, "H1", root, wanted) == len(set(wanted) - {f"H1/{n}" for n in done})


@pytest.mark.parametrize("image_id", ["H1/p00099_00.png", "H1/p00000_09.png", "H1/../secret.png", "H1/p0_0.png", "x"])
def test_an_id_that_the_hospital_does_not_have_is_refused(image_id):
    with pytest.raises(StudyError, match="film"):
        masks(SMALL, "H1", image_id)


@lru_cache(maxsize=8)
def glances(settings: PhantomSettings, source: str) -> np.ndarray:
    """Return 300 patients' films at 16 × 16 pixels, (300, 256)."""
    films = (draw_film(settings, source, f"{source}/p{patient:05d}_00.png") for patient in range(300))
    small = (Image.fromarray(film.pixels).resize((16, 16), Image.Resampling.BOX) for film in films)
    return np.stack([np.asarray(picture, np.float64).ravel() / 255 for picture in small])


def source_accuracy(first: PhantomSettings, second: PhantomSettings) -> float:
    """Tell two hospitals' films apart by ridge regression; returns the share of new films told right."""
    x = np.concatenate([glances(first, "H1"), glances(second, "H2")])
    y = np.repeat([-1, 1], 300)
    test = np.arange(600) % 3 == 0
    mean = x[~test].mean(axis=0)
    x = x - mean
    weights = np.linalg.solve(x[~test].T @ x[~test] + 0.3 * np.eye(256), x[~test].T @ y[~test])
    return float(((x[test] @ weights > 0) == (y[test] > 0)).mean())


def of_look(look: str, **changes: float) -> PhantomSettings:
    return PhantomSettings(look=look, patients=300, films_per_patient=1, size=64, **changes)  # pyright: ignore


# Guessing 200 films: standard error 0.035, so chance lies in 0.5 ± 0.11 (three of them).
CHANCE = 0.11


def test_hospitals_of_different_looks_are_told_apart_from_a_glance():
    assert source_accuracy(of_look("north"), of_look("south")) > 0.95


def test_the_text_alone_gives_the_hospital_away():
    plain = {"collimation": 0.0, "gain": 0.0}
    assert source_accuracy(of_look("north", **plain), of_look("south", **plain)) > 0.85


def test_hospitals_of_equal_looks_cannot_be_told_apart():
    assert abs(source_accuracy(of_look("north"), of_look("north")) - 0.5) < CHANCE


def test_hospitals_without_text_collimation_and_gain_cannot_be_told_apart():
    nothing = {"tag_visibility": 0.0, "collimation": 0.0, "gain": 0.0}
    assert abs(source_accuracy(of_look("north", **nothing), of_look("south", **nothing)) - 0.5) < CHANCE


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("look", "west", "look: must be one of"),
        ("patients", 0, "patients"),
        ("size", 8, "size"),
        ("tag_visibility", 1.5, "tag_visibility"),
        ("tag_association", 0.5, "tag_share ± tag_association"),
        ("pneumonia_share", 0.9, "add up to at most 1"),
        ("tag_finding", "Gout", "tag_finding"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_rule(setting, value, rule):
    with pytest.raises(ValueError, match=rule):
        PhantomSettings(**{setting: value})
