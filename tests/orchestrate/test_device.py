"""A worker's share of a GPU's memory is what the spec asks for; a GPU that is not there is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from raystudy.errors import StudyError
from raystudy.orchestrate.assignment import Device
from raystudy.orchestrate.worker import claim_device


@pytest.mark.parametrize(
    ("device", "share"),
    [(Device(0.25), 0.25), (Device(1.0), 1.0), (Device(0.25, memory_gb=20), 0.25), (Device(0.5, memory_gb=200), 1.0)],
)
def test_the_memory_share_is_enforced(device: Device, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[float, int]] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(
        "torch.cuda.set_per_process_memory_fraction", lambda fraction, card: limits.append((fraction, card))
    )
    assert claim_device(device) == "cuda"
    assert limits == [(share, 0)]


def test_without_gpus_nothing_is_claimed_and_a_missing_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert claim_device(Device(0)) == "cpu"
    with pytest.raises(StudyError, match="sees no CUDA device"):
        claim_device(Device(0.25))
