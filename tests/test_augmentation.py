from pathlib import Path

import numpy as np
import pytest
import torch

from raystudy.augmentation import COPIES, AugmentedFilms, flips, homography, rotations, shears, skews, transform
from raystudy.films import Films
from raystudy.protopnet.normalise import normalise
from raystudy.storage import open_storage
from raystudy.streams import stream
from raystudy.trial import TrialInterrupted, run_trial
from tests.trial_example import SIZE, contents, data, spec

CORNERS = np.array([[-1.0, -1.0, 1.0], [1.0, -1.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]])


def train_films() -> Films:
    cohort, _, images = data()
    return Films(cohort[cohort["role"] == "train"], images, torch.device("cpu"))


def augmented() -> AugmentedFilms:
    return AugmentedFilms(train_films(), lambda copy: stream(0, "augmentation", copy))


@pytest.mark.parametrize("kind", [rotations, skews, shears, flips])
def test_no_border_is_ever_seen(kind) -> None:
    points = np.einsum("nij,kj->nki", kind(stream(1, "border"), 500), CORNERS)
    points = points[..., :2] / points[..., 2:]
    assert np.abs(points).max() <= 1 + 1e-9  # projective maps keep the square's inside between its corners
    assert np.abs(points).max(axis=(1, 2)) == pytest.approx(1.0)  # and no transformation zooms more than it must


def test_rotations_reach_fifteen_degrees_and_shears_ten() -> None:
    rotated = rotations(stream(2, "angles"), 2000)
    angles = np.rad2deg(np.arctan2(rotated[:, 1, 0], rotated[:, 0, 0]))
    assert np.abs(angles).max() == pytest.approx(15, abs=0.1)
    slopes = shears(stream(2, "angles"), 2000)
    largest = np.maximum(np.abs(slopes[:, 0, 1]), np.abs(slopes[:, 1, 0])).max()
    assert np.rad2deg(np.arctan(largest)) == pytest.approx(10, abs=0.1)


def test_a_flip_mirrors_exactly_and_the_identity_changes_nothing() -> None:
    grey = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    identity, mirror = torch.eye(3), torch.diag(torch.tensor([-1.0, 1.0, 1.0]))
    seen = transform(grey, torch.stack([identity, mirror]))
    torch.testing.assert_close(seen[0], grey[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[1], grey[1].flip(-1), atol=1e-6, rtol=0)


def test_a_quarter_turn_moves_a_mark_as_it_should() -> None:
    grey = torch.zeros(1, 9, 9)
    grey[0, 0, 4] = 1.0  # the top
    turn = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])  # output (x, y) looks at (-y, x)
    row, col = divmod(int(transform(grey, turn)[0].argmax()), 9)
    assert (row, col) == (4, 0)  # the mark at (0, -1) is seen where (-y, x) = (0, -1): x = -1, y = 0


def test_a_homography_takes_its_four_points_to_theirs() -> None:
    points = CORNERS[:, :2]
    images = points * 0.7 + np.array([[0.1, 0.0], [0.0, 0.2], [0.05, 0.05], [0.0, 0.0]])
    found = CORNERS @ homography(points, images).T
    np.testing.assert_allclose(found[:, :2] / found[:, 2:], images, atol=1e-12)


def test_the_set_is_thirty_fold_and_half_of_it_mirrored() -> None:
    films, copies = train_films(), augmented()
    assert len(copies) == COPIES * len(films)
    assert torch.equal(copies.labels[: len(films)], films.labels)
    assert torch.equal(copies.labels[-len(films) :], films.labels)
    index = torch.tensor([3, 3 + len(films), 3 + 29 * len(films)])
    batch = copies.batch(index)
    assert batch.shape == (3, 3, SIZE, SIZE)
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(batch, copies.batch(index))  # the same in each epoch
    plain = normalise(films.grey(torch.tensor([3])))
    assert plain.min() - 1e-5 <= batch.min()
    assert batch.max() <= plain.max() + 1e-5
    mirrored = np.mean(flips(stream(0, "f"), 4000)[:, 0, 0] < 0)
    assert mirrored == pytest.approx(0.5, abs=0.03)


def test_an_augmented_trial_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    one = {"epochs": 1, "warm_epochs": 0, "projection_interval": 1, "last_layer_epochs": 1, "batch_size": 100}
    trial = spec({**one, "augmentation": "published"})
    cohort, tests, images = data()
    inputs = cohort[~((cohort["role"] == "train") & (cohort.index % 3 > 0))], tests, images
    run_trial(trial, *inputs, open_storage(tmp_path / "whole"))
    # Ten films are 300 copies: 3 steps, 2 chunks of validation, 3 of the projection, 30 of copies, 3 last-layer steps.
    for stop in (2, 38):
        asked = iter(range(1, 1000))
        with pytest.raises(TrialInterrupted):
            run_trial(trial, *inputs, open_storage(tmp_path / "x"), should_stop=lambda a=asked, s=stop: next(a) == s)
    assert open_storage(tmp_path / "x").read_events("events")[-1]["stage"] == "last_layer"
    run_trial(trial, *inputs, open_storage(tmp_path / "x"))
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
