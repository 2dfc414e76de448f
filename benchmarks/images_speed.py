"""Films: how fast and with how much memory they are prepared, and what they cost a trial afterwards.

Every row is a ratio measured in one run on this machine, arms alternating, so that other load falls on both.  The S3
server is a real one (SeaweedFS on loopback) and shares the machine's processors with whoever fetches from it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image

from raystudy.images.originals import read_original
from raystudy.images.prepare import prepare_images
from raystudy.images.settings import ImageSettings
from raystudy.images.store import FOLDER, Film, load_pixels, pixels_key, write_block
from raystudy.images.stream import map_pixels
from raystudy.storage import Storage, open_storage
from raystudy.streams import stream
from tests.cohorts.hospitals import SHARED
from tests.images.films import encoded
from tests.s3_server import S3Server

PREPARED = 2000  # films 1024 -> 224
ROUNDS = 2
DISTINCT = 40  # different originals; each is stored under many names
MEMORY = (2000, 20_000)  # films 256 -> 224
LOADED = 5700
SETTINGS = ImageSettings(size=224)


def rows() -> list[dict[str, Any]]:
    """Return the measured rows: name, ratio, ours, peer, unit, n, note."""
    with tempfile.TemporaryDirectory(prefix="raystudy-bench-") as folder:
        place = Path(folder)
        films = [*prepare_from_s3(place), memory_of_prepare(place), *into_a_trial(place), loader_tax()]
        return [*films, *plan_of_full_tables(place)]


def _row(name: str, ours: float, peer: float, unit: str, n: int, note: str) -> dict[str, Any]:
    return {"name": name, "ratio": ours / peer, "ours": ours, "peer": peer, "unit": unit, "n": n, "note": note}


def _originals(size: int, n: int) -> list[bytes]:
    """Films as NIH stores them: 8-bit PNG, about 0.4 byte a pixel."""
    films = []
    for number in range(n):
        rng = stream(0, "bench", size, number)
        coarse = rng.integers(20, 236, (size // 16, size // 16), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + rng.normal(0, 1.0, (size, size)).astype(np.float32)
        films.append(encoded(noisy.clip(0, 255).astype(np.uint8), "PNG"))
    return films


# --- prepare, from S3 ---


def prepare_from_s3(place: Path) -> list[dict[str, Any]]:
    server = S3Server(Path(tempfile.mkdtemp(dir=place)))
    os.environ.update(server.environment())
    server.start()
    try:
        server.create_bucket("bench")
        bucket = open_storage("s3://bench")
        films = _originals(1024, DISTINCT)
        names = [f"originals/{number:05d}.png" for number in range(PREPARED)]
        for number, name in enumerate(names):
            bucket.write_bytes(name, films[number % DISTINCT])
        with ray_on_this_machine(), multiprocessing.get_context("spawn").Pool(2) as pool:
            return _race(bucket, [bucket.address(name) for name in names], pool, sum(map(len, films)) / DISTINCT)
    finally:
        server.stop()


def _race(bucket: Storage, uris: list[str], pool: Any, film_bytes: float) -> list[dict[str, Any]]:
    def ours(part: list[str]) -> None:
        table = pd.DataFrame({"image_id": part, "uri": part})
        assert prepare_images(table, SETTINGS, bucket.child(f"studies-{time.time_ns()}")).n_new == len(part)

    def pillow(part: list[str]) -> None:
        assert len(pool.map(fetch_and_decode, part, chunksize=16)) == len(part)

    def read_images(part: list[str]) -> None:
        import ray

        file_system, root = bucket.filesystem()
        paths = [f"{root}/{uri.removeprefix(bucket.uri + '/')}" for uri in part]
        images = ray.data.read_images(paths, filesystem=file_system, size=(224, 224), mode="L")
        assert sum(len(batch["image"]) for batch in images.iter_batches(batch_size=64)) == len(part)

    arms: list[Callable[[list[str]], None]] = [ours, pillow, read_images]
    for arm in arms:  # processes, imports and connections of everybody are there before the clock starts
        arm(uris[:64])
    seconds = dict.fromkeys(arms, 0.0)
    for number in range(ROUNDS):
        for arm in arms[number % 2 :] + arms[: number % 2]:
            started = time.monotonic()
            arm(uris)
            seconds[arm] += time.monotonic() - started
    speed = {arm: ROUNDS * len(uris) / seconds[arm] for arm in arms}
    note = f"1024 -> 224 from S3, {film_bytes / 1e3:.0f} kB a film, {os.cpu_count()} processors with the server on them"
    return [
        _row("prepare / 2-process Pillow pool", speed[ours], speed[pillow], "films/s", len(uris), note + "; ≥ 0.85"),
        _row("prepare / ray.data.read_images", speed[ours], speed[read_images], "films/s", len(uris), note + "; ≥ 1.5"),
    ]


def fetch_and_decode(uri: str) -> int:
    """The peer: fetch, decode, grey, resize; nothing is checked, hashed or written."""
    with Image.open(_stream(read_original(uri))) as image:
        return int(np.asarray(image.convert("L").resize((224, 224), Image.Resampling.BILINEAR))[0, 0])


def _stream(data: bytes) -> Any:
    import io

    return io.BytesIO(data)


@contextlib.contextmanager
def ray_on_this_machine() -> Iterator[None]:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else every other process goes before Ray's workers
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=500_000_000, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


# --- memory ---


def memory_of_prepare(place: Path) -> dict[str, Any]:
    films = _originals(256, DISTINCT)
    peaks = []
    for n in MEMORY:
        folder = place / f"films-{n}"
        folder.mkdir()
        for number in range(n):
            path = folder / f"{number:05d}.png"
            if number < DISTINCT:
                path.write_bytes(films[number])
            else:
                os.link(folder / f"{number % DISTINCT:05d}.png", path)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a driver of its own: nothing is left from before
            peaks.append(pool.apply(_peak_of_prepare, (str(folder),)))
    return _row(
        f"peak memory of prepare, {MEMORY[1]} / {MEMORY[0]} films", peaks[1] / 1e6, peaks[0] / 1e6, "MB (PSS)",
        MEMORY[1], "256 -> 224, driver, workers and object store; about 1 = independent of N",
    )  # fmt: skip


def _peak_of_prepare(folder: str) -> int:
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.3):
            peak = max(peak, _tree_pss())

    with ray_on_this_machine():
        files = sorted(str(path) for path in Path(folder).iterdir())
        watcher = threading.Thread(target=watch)
        watcher.start()
        prepare_images(pd.DataFrame({"image_id": files, "uri": files}), SETTINGS, open_storage(folder + "-studies"))
        stop.set()
        watcher.join()
    return peak


def _tree_pss() -> int:
    """Sum the proportional set size of this process and everything below it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    family = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    total = 0
    for pid in family:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


# --- into a trial ---


def into_a_trial(place: Path) -> list[dict[str, Any]]:
    import ray

    storage, key, ids = _store_of(place, LOADED)
    started = time.monotonic()
    films = load_pixels(storage, key, ids)
    first = time.monotonic() - started
    with ray_on_this_machine():
        shared = ray.put(films)

        @ray.remote
        def trial(reference: Any) -> float:
            begun = time.monotonic()
            arrived: Any = ray.get(reference[0])
            return time.monotonic() - begun if arrived.pixels.shape[0] == LOADED else float("inf")

        shared_seconds = max(ray.get([trial.remote([shared]) for _ in range(2)]))
    node = place / "node"
    map_pixels(storage, key, ids, node)
    started = time.monotonic()
    map_pixels(storage, key, ids, node)
    mapped = time.monotonic() - started
    note = f"{LOADED} films of 224 × 224; peer is the first load on the node from the store; ≤ 1 s"
    return [
        _row("films into a trial, shared array", shared_seconds, first, "s", LOADED, note),
        _row("films into a trial, streamed", mapped, first, "s", LOADED, note),
    ]


def _store_of(place: Path, n: int) -> tuple[Storage, str, list[str]]:
    """A store with n decoded films, without the way through originals."""
    storage, pixels = open_storage(place / "store"), pixels_key(SETTINGS)
    key, index = f"{pixels}-000000000000", []
    rng = stream(0, "bench", "store")
    smooth = np.asarray(
        Image.fromarray(rng.integers(20, 236, (14, 14), dtype=np.uint8)).resize((224, 224), 3), np.int16
    )
    for start in range(0, n, 64):
        noise = rng.integers(-3, 4, (min(64, n - start), 224, 224))
        films = [Film(f"f{start + i}", "", (smooth + part).astype(np.uint8), None) for i, part in enumerate(noise)]
        written = write_block(storage, pixels, films, 224).to_pylist()
        index += [{**row, "image_id": row["fingerprint"]} for row in written]
    storage.write_table(f"{FOLDER}/{key}/index.parquet", pa.Table.from_pylist(index))
    order = stream(0, "bench", "order").permutation(n)
    return storage, key, [f"f{i}" for i in order]


def loader_tax() -> dict[str, Any]:
    """One epoch from the shared uint8 array (take, normalise) against tensors that are resident and normalised."""
    import torch

    from raystudy.images.array import ImageArray
    from raystudy.protopnet.normalise import normalise
    from raystudy.torchvision_shim import torchvision

    rng = stream(0, "bench", "tax")
    ids = tuple(f"f{i}" for i in range(320))
    films = ImageArray(ids, rng.integers(0, 256, (len(ids), 96, 96), dtype=np.uint8))
    resident = normalise(torch.from_numpy(films.pixels))
    model = torchvision.models.resnet18(num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    target = torch.zeros(32, dtype=torch.long)
    seconds = {"films": 0.0, "resident": 0.0}
    order = rng.permutation(len(ids))
    for start in range(0, len(ids), 32):
        for arm in ("films", "resident") if start % 64 else ("resident", "films"):
            begun = time.monotonic()
            rows = order[start : start + 32]
            batch = (
                normalise(torch.from_numpy(films.take([ids[i] for i in rows]))) if arm == "films" else resident[rows]
            )
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()
            seconds[arm] += time.monotonic() - begun
    note = "ResNet18, 96 px, batch 32, one epoch; ≤ 1.10"
    return _row(
        "training epoch, shared films / resident tensors", seconds["films"], seconds["resident"], "s", 320, note
    )


# --- who is in the paper's study ---

TIMED = """
import sys, time
started = time.monotonic()
{work}
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.monotonic() - started, peak, file=sys.stderr)
"""
PLAN = """
from raystudy.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code
"""
READ = """
import pandas
for table in sys.argv[1:]:
    pandas.read_csv(table, dtype=str)
"""


def plan_of_full_tables(place: Path) -> list[dict[str, Any]]:
    """`raystudy plan experiments/paper.yaml` on the real tables of NIH and CheXpert; no row where they are not."""
    root = SHARED / "data" / "metadata"
    names = {
        "H1.table": "nih_Data_Entry_2017_v2020.csv.gz",
        "H2.train": "chexpert_train.csv.gz",
        "H2.valid": "chexpert_valid.csv.gz",
    }
    tables = [str(root / name) for name in names.values()]
    if not all(map(os.path.exists, tables)):
        return []
    told = {"H1.root": root, "H2.root": root, **names}
    plan = ["plan", "experiments/paper.yaml", "--storage", str(place / "planned")]
    plan += [word for key, value in told.items() for word in ("--set", f"sources.{key}={value}")]
    arms, rounds = {"plan": (PLAN, plan), "read": (READ, tables)}, 3
    seconds, peaks = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, 0.0)
    for _ in range(rounds):
        for name, (work, arguments) in arms.items():
            command = [sys.executable, "-c", TIMED.format(work=work), *arguments]
            done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            took, peak = map(float, done.stderr.splitlines()[-1].split())
            seconds[name] += took / rounds
            peaks[name] = max(peaks[name], peak / 1e6)
    note = "112,120 + 223,414 + 234 rows, a process each; peer is pandas.read_csv of the same files; ≤ {}"
    return [
        _row("plan of the full tables", seconds["plan"], seconds["read"], "s", rounds, note.format("10 s")),
        _row("its peak memory", peaks["plan"], peaks["read"], "GB", rounds, note.format("1.5 GB")),
    ]
