"""A checkpoint write may be cut anywhere, and any bit may flip: what is read is a whole checkpoint or none."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from raystudy.checkpoint import Checkpoints
from raystudy.storage import open_storage
from raystudy.streams import stream
from tests.faults.conftest import Tally

TENSORS = {"w": torch.arange(8, dtype=torch.float32)}


def written(folder: Path, n: int) -> dict[str, bytes]:
    """Write n checkpoints and return the files."""
    storage = open_storage(folder)
    kept = Checkpoints(storage, "spec")
    for epoch in range(1, n + 1):
        kept.write({"w": TENSORS["w"] + epoch}, {"epoch": epoch})
    return {name: storage.read_bytes(name) for name in storage.list()}


def epoch_read(folder: Path) -> int:
    """Return the epoch of the checkpoint that is found, 0 for none; its tensors must belong to it."""
    found, _ = Checkpoints(open_storage(folder), "spec").latest()
    if found is None:
        return 0
    assert torch.equal(found.tensors["w"], TENSORS["w"] + found.state["epoch"])
    return found.state["epoch"]


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def prefixes(first: dict[str, bytes], second: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
    """Yield every state of a store without atomic writes on the way from one checkpoint to two, byte by byte."""
    tensors = next(n for n in second if n.startswith("state-000002"))
    for length in range(len(second[tensors]) + 1):
        yield {**first, tensors: second[tensors][:length]}
    for length in range(len(second["000002.json"]) + 1):
        yield {**first, tensors: second[tensors], "000002.json": second["000002.json"][:length]}


@pytest.mark.parametrize("n_before", [0, 1])
def test_every_prefix_of_a_checkpoint_write_leaves_the_one_before(tmp_path: Path, n_before: int, tally: Tally) -> None:
    second = written(tmp_path / "two", 2)
    first = {n: data for n, data in second.items() if "000001" in n} if n_before else {}
    states = list(prefixes(first, second))
    for files in states[:-1]:
        put(tmp_path / "cut", files)
        assert epoch_read(tmp_path / "cut") == n_before
    put(tmp_path / "cut", states[-1])
    assert epoch_read(tmp_path / "cut") == 2
    tally(f"{len(states)} prefixes of a checkpoint write")


def test_a_flipped_bit_in_the_newest_checkpoint_is_found_wherever_it_is(tmp_path: Path) -> None:
    files = written(tmp_path / "whole", 2)
    draw = stream(0, "flip")
    for name in (n for n in files if "000002" in n):
        places = range(len(files[name])) if name.endswith(".json") else draw.integers(0, len(files[name]), 64)
        for place in places:
            data = bytearray(files[name])
            data[place] ^= 1 << int(draw.integers(8))
            put(tmp_path / "flipped", {**files, name: bytes(data)})
            assert epoch_read(tmp_path / "flipped") in ((1, 2) if name.endswith(".json") else (1,))


def test_a_torn_tail_in_both_checkpoints_means_starting_again(tmp_path: Path) -> None:
    files = written(tmp_path / "whole", 2)
    put(tmp_path / "torn", {n: d[:-3] for n, d in files.items()})
    found, problems = Checkpoints(open_storage(tmp_path / "torn"), "spec").latest()
    assert found is None
    assert len(problems) == 2


def test_a_missing_tensor_file_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    files = written(tmp_path / "whole", 2)
    put(tmp_path / "half", {n: d for n, d in files.items() if not n.startswith("state-000002")})
    assert epoch_read(tmp_path / "half") == 1


def test_a_write_that_fails_half_way_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A file-size limit plays the full disk: the tensors do not fit, the process lives on."""
    written(tmp_path, 1)
    pid = os.fork()
    if pid == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            Checkpoints(open_storage(tmp_path), "spec").write({"w": torch.from_numpy(np.zeros(10_000))}, {"epoch": 2})
        except BaseException:
            os._exit(17)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 17
    assert epoch_read(tmp_path) == 1
