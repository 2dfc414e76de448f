import json
import time
from pathlib import Path

import pytest
import torch

from raystudy.checkpoint import CheckpointClock, Checkpoints
from raystudy.storage import Storage, open_storage

TENSORS = {
    "model.w": torch.arange(6.0).reshape(2, 3),
    "optimizer.step": torch.tensor(3.0),
    "bits": torch.tensor([0, 255]),
}
STATE = {"epoch": 3, "phase": "last_layer", "history": [{"loss": 0.1 + 0.2, "epoch": 1}], "record": None}


def checkpoints(folder: Path) -> tuple[Storage, Checkpoints]:
    storage = open_storage(folder)
    return storage, Checkpoints(storage, "spec-a")


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    _, kept = checkpoints(tmp_path)
    assert kept.latest() == (None, [])
    kept.write(TENSORS, STATE)
    found, problems = kept.latest()
    assert found is not None
    assert problems == []
    assert found.state == STATE
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_the_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    storage, kept = checkpoints(tmp_path)
    for epoch in range(5):
        kept.write(TENSORS, {"epoch": epoch})
    assert [n for n in storage.list() if n.endswith(".json")] == ["000004.json", "000005.json"]
    assert len(storage.list()) == 4
    found, _ = kept.latest()
    assert found is not None
    assert found.state == {"epoch": 4}
    kept.clear()
    assert storage.list() == []
    assert kept.latest() == (None, [])


def test_a_checkpoint_of_another_spec_is_named_and_not_read(tmp_path: Path) -> None:
    storage, kept = checkpoints(tmp_path)
    kept.write(TENSORS, STATE)
    found, problems = Checkpoints(storage, "spec-b").latest()
    assert found is None
    assert problems == ["000001.json: it belongs to another spec or other data"]


def test_channels_last_tensors_keep_their_values(tmp_path: Path) -> None:
    _, kept = checkpoints(tmp_path)
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    kept.write({"w": weight}, {})
    found, _ = kept.latest()
    assert found is not None
    assert torch.equal(found.tensors["w"], weight)


def test_a_damaged_checkpoint_gives_way_to_whole_ones(tmp_path: Path) -> None:
    storage, kept = checkpoints(tmp_path)
    kept.write(TENSORS, {"epoch": 1})
    kept.write(TENSORS, {"epoch": 2})
    newest = next(n for n in storage.list() if n.startswith("state-000002"))
    (tmp_path / newest).write_bytes(storage.read_bytes(newest)[:-1])
    again = Checkpoints(storage, "spec-a")
    found, problems = again.latest()
    assert found is not None
    assert found.state == {"epoch": 1}
    assert problems == [f"000002.json: {newest} does not match its checksum"]
    again.write(TENSORS, {"epoch": 3})  # the damaged one is removed, not the whole one before it
    assert [n for n in storage.list() if n.endswith(".json")] == ["000001.json", "000003.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b'{"checkpoint": {}}', b'{"checkpoint": 1, "sha256": "x"}']
)
def test_any_text_in_place_of_a_pointer_is_damage_and_no_crash(tmp_path: Path, content: bytes) -> None:
    storage, kept = checkpoints(tmp_path)
    kept.write(TENSORS, {"epoch": 1})
    storage.write_bytes("000002.json", content)
    found, problems = kept.latest()
    assert found is not None
    assert found.state == {"epoch": 1}
    assert len(problems) == 1
    assert problems[0].startswith("000002.json: the pointer")


def test_a_pointer_whose_text_was_edited_is_not_believed(tmp_path: Path) -> None:
    storage, kept = checkpoints(tmp_path)
    kept.write(TENSORS, {"epoch": 1})
    pointer = storage.read_json("000001.json")
    pointer["checkpoint"]["state"]["epoch"] = 2
    storage.write_bytes("000001.json", json.dumps(pointer).encode())
    assert kept.latest() == (None, ["000001.json: the pointer does not match its checksum"])


def test_files_that_are_no_checkpoints_are_ignored(tmp_path: Path) -> None:
    storage, kept = checkpoints(tmp_path)
    storage.write_bytes("notes.json", b"{}")
    kept.write(TENSORS, STATE)
    assert kept.latest()[1] == []


def test_the_pause_is_twenty_times_the_last_write() -> None:
    clock = CheckpointClock(share=0.05, n_bytes=0, shortest=0.0)
    assert clock.interval == pytest.approx(20 * 0.01)  # an empty model is taken to need 10 ms
    assert not clock.due()
    clock.wrote(0.001)
    assert clock.interval == pytest.approx(0.02)
    time.sleep(0.03)
    assert clock.due()


def test_a_small_share_lengthens_the_pause_and_a_large_model_delays_the_first_write() -> None:
    clock = CheckpointClock(share=0.01, n_bytes=0, shortest=0.0)
    clock.wrote(1.0)
    assert clock.interval == pytest.approx(99.0)  # 1 s of writing in 100 s
    large = CheckpointClock(share=0.05, n_bytes=340_000_000)
    assert large.interval == pytest.approx(20 * (0.01 + 3.4))
    assert CheckpointClock(share=1.0, n_bytes=0, shortest=5.0).interval == 5.0
