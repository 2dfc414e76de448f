"""A training step lives on its device: it asks it for no value and brings no tensor from elsewhere.

The meta device computes shapes and no values, so that reading one (`.item()`, `.cpu()`, `if tensor`, indexing by a
mask) fails there, and so does mixing it with a tensor that was left on the CPU.  What would make a GPU's queue wait in
every step is found without a GPU.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from raystudy import trial as trial_module
from raystudy.checkpoint import Checkpoints
from raystudy.storage import open_storage
from tests.trial_example import data, spec

STEPS = 3


class _Enough(Exception):
    pass


def trial_on_meta(folder: Path, monkeypatch: pytest.MonkeyPatch, **training: Any) -> trial_module._Trial:
    polls = itertools.count(1)

    def stop() -> bool:
        if next(polls) == STEPS:
            raise _Enough  # before the end of the epoch, where values are read
        return False

    # autocast knows no meta device; which tensors are in bf16 is tested elsewhere
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    storage = open_storage(str(folder))
    trial = trial_module._Trial(
        spec(training), *data(), storage, checkpoints=Checkpoints(storage.child("checkpoint"), "0"),
        device=torch.device("meta"), should_stop=stop, checkpoint_pause=1e9,
    )  # fmt: skip
    trial.at.epoch = 1  # the example's first joint epoch
    return trial


@pytest.mark.parametrize("stage", ["warm", "joint"])
@pytest.mark.parametrize("augmentation", ["none", "published"])
def test_a_training_step_reads_no_value_and_stays_on_its_device(
    stage: Any, augmentation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = trial_on_meta(tmp_path, monkeypatch, precision="bf16", augmentation=augmentation)
    trial.at.epoch = ("warm", "joint").index(stage)
    assert {t.device.type for t in trial.model.state_dict().values()} == {"meta"}
    with pytest.raises(_Enough):
        trial.train_epoch(stage)
    assert trial.at.step == STEPS


@pytest.mark.parametrize("last_layer_bn", ["frozen", "published"])
def test_a_last_layer_step_reads_no_value(last_layer_bn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = trial_on_meta(tmp_path, monkeypatch, last_layer_bn=last_layer_bn)
    trial.scores["shown"] = torch.zeros(30, 6, device="meta")  # what the projection's pass has left
    with pytest.raises(_Enough):
        trial.train_last_layer_epoch()
    assert trial.at.step == STEPS


def test_reading_a_value_in_a_step_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = trial_on_meta(tmp_path, monkeypatch)
    update = trial.update

    def curious(optimizer: Any, losses: Any, n: int) -> None:
        update(optimizer, losses, n)
        losses.total.item()

    monkeypatch.setattr(trial, "update", curious)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # what torch raises for .item() there
        trial.train_epoch("joint")


def test_films_are_grey_bytes_on_the_device_and_stay_shared_on_the_cpu() -> None:
    cohort, _, images = data()
    resident = trial_module.Films(cohort, images, torch.device("meta"))
    assert (resident.grey(torch.arange(3, device="meta")).dtype, resident.labels.device.type) == (torch.uint8, "meta")
    batch = resident.batch(torch.arange(3, device="meta"))
    assert (batch.device.type, batch.dtype) == ("meta", torch.float32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert trial_module.Films(cohort, images, torch.device("cpu"))._resident is None
