"""`raystudy explain`: a picture of why a finished trial says what it says about one film."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from raystudy.cli import app
from raystudy.study import Study
from tests.tiny_study import TinyStudy


def explain(tiny_study: TinyStudy, study: Study, trial: str, *films: str) -> tuple[int, str]:
    storage = str(Path(study.storage.uri).parent)
    shown = CliRunner().invoke(app, ["explain", str(tiny_study.file), trial, *films, "--storage", storage])
    assert shown.exception is None or isinstance(shown.exception, SystemExit)
    return shown.exit_code, shown.output


@pytest.fixture
def study(tiny_study: TinyStudy, tmp_path: Path) -> Study:
    """The finished study, with its films beside it."""
    (tmp_path / "_images").symlink_to(Path(tiny_study.study.storage.uri).parent / "_images")
    return tiny_study.copy(tmp_path)


def test_a_film_of_the_study_and_a_file_each_get_a_picture(tiny_study: TinyStudy, study: Study, tmp_path: Path) -> None:
    own = str(study.trial(study.trial_ids()[1]).read_table("predictions.parquet")["image_id"][0])
    file = tmp_path / "a film of mine.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40), dtype=np.uint8)).save(file)
    code, output = explain(tiny_study, study, "pneumonia-h1_050", own, str(file))
    assert code == 0, output
    for path in output.splitlines():
        pixels = np.asarray(Image.open(io.BytesIO(Path(path).read_bytes())).convert("RGB")).astype(int)
        assert min(pixels.shape[:2]) > 100
        assert (pixels.max(axis=2) - pixels.min(axis=2)).max() > 100  # heat maps have colours
    assert len(set(output.splitlines())) == 2


def test_films_whose_names_are_alike_get_a_picture_each(
    tiny_study: TinyStudy, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for value, name in ((40, "a/b.png"), (200, "a_b.png")):
        Image.fromarray(np.full((50, 40), value, np.uint8)).save(name)
    code, output = explain(tiny_study, study, "pneumonia-h1_050", "a/b.png", "a_b.png")
    assert code == 0, output
    first, second = (Path(line).read_bytes() for line in output.splitlines())
    assert first != second


def test_what_cannot_be_explained_is_refused_by_name(tiny_study: TinyStudy, study: Study, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no film at all")
    for film, what in (
        ("H1/nowhere.png", "neither an image id of this study nor a file"),
        (str(tmp_path), "neither an image id of this study nor a file"),
        (str(broken), "the film cannot be read"),
        ("x" * 5000, "the film cannot be read: File name too long"),
    ):
        code, output = explain(tiny_study, study, "pneumonia-h1_050", film)
        assert code == 2, output
        assert what in output
    for trial, what in (("pneumonia", "3 trials of this study begin with"), ("measles", "no trial of this study")):
        code, output = explain(tiny_study, study, trial, str(broken))
        assert code == 2, output
        assert what in output
    study.trial(study.trial_ids()[1]).delete("result.json")
    code, output = explain(tiny_study, study, "pneumonia-h1_050", str(broken))
    assert code == 2, output
    assert "is not finished" in output
