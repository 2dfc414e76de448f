"""One trial, from its spec to result.json: the paper's training of one ProtoPNet on one mixture (method.md a.3, a.7).

In flow a spec, the cohort's and the tests' rows and the shared pixels; out flow the files of the trial's directory.  It
knows no scheduler and runs alike in a plain process and in Ray.  It may be stopped between any two steps and goes on
from its checkpoint with the same bits (DESIGN.md rules 3 to 5).
"""

# torch and pyarrow ship partial types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from raystudy import trial_files
from raystudy.augmentation import AugmentedFilms
from raystudy.checkpoint import CheckpointClock, Checkpoints
from raystudy.films import Films, check_films
from raystudy.images.array import ImageArray
from raystudy.numerics import numerics
from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.losses import LossTerms, last_layer_loss, loss_terms
from raystudy.protopnet.projection import project_features
from raystudy.protopnet.stages import (
    build_optimizers,
    last_layer_epochs_after,
    projects_after,
    set_learning_rates,
    set_stage,
    stage_of,
)
from raystudy.protopnet.weights import start_from_weights
from raystudy.results import read_result
from raystudy.storage import Storage
from raystudy.streams import stream, stream_seed
from raystudy.trial_spec import TrialSpec
from raystudy.trial_state import Position, is_better, pack, unpack

TOLD_SECONDS = 5.0

__all__ = ["TrialInterrupted", "TrialSpec", "load_model", "run_trial"]


class TrialInterrupted(Exception):
    """The trial was asked to stop, wrote a checkpoint and will go on from there."""


class _DivergedError(Exception):
    """The loss or the network's activations are not finite: the trial ends and is not tried again."""


def run_trial(
    spec: TrialSpec,
    cohort: pd.DataFrame,
    tests: pd.DataFrame,
    images: ImageArray,
    storage: Storage,
    *,
    device: str | torch.device = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_pause: float = 5.0,
) -> dict[str, Any]:
    """Train, select and test one ProtoPNet, or go on with it; a finished trial is only read.

    Parameters
    ----------
    spec : what the trial is.
    cohort : the mixture's rows with role train or val.
    tests : the task's test rows with test_set; an image once per set that it belongs to.
    images : the pixels of both.
    storage : the trial's own directory.
    device : where to compute; the spec does not know it.
    should_stop : asked after every step.
    checkpoint_pause : fewest seconds between two checkpoints.

    Returns
    -------
    The content of result.json; its status is ``finished`` or ``diverged``.

    Raises
    ------
    TrialInterrupted : ``should_stop`` said so; a checkpoint is there.
    ValueError : rows, pixels and spec do not fit together; nothing was done.
    StudyError : the directory holds a damaged result, or another trial.
    """
    device = torch.device(device)
    checkpoints = Checkpoints(storage.child("checkpoint"), spec.fingerprint())
    result = read_result(storage)
    if result is None:
        check_films(cohort, tests, images, spec.image_size)
        trial_files.keep_spec(storage, spec)
        with numerics(spec.training.threads, device, deterministic=spec.training.deterministic):
            result = _Trial(
                spec,
                cohort,
                tests,
                images,
                storage,
                checkpoints=checkpoints,
                device=device,
                should_stop=should_stop,
                checkpoint_pause=checkpoint_pause,
            ).run()
    checkpoints.clear()
    return result


def load_model(storage: Storage, device: str | torch.device = "cpu") -> ProtoPNet:
    """Return the selected network of a finished trial's directory, in eval mode."""
    model = ProtoPNet.from_settings(trial_files.read_spec(storage).model)
    model.load_state_dict(trial_files.read_model(storage))
    return model.to(device).eval()


class _Trial:
    """A network in training, and everything that must outlive an interruption."""

    def __init__(
        self,
        spec: TrialSpec,
        cohort: pd.DataFrame,
        tests: pd.DataFrame,
        images: ImageArray,
        storage: Storage,
        *,
        checkpoints: Checkpoints,
        device: torch.device,
        should_stop: Callable[[], bool],
        checkpoint_pause: float,
    ) -> None:
        self.spec, self.settings, self.device = spec, spec.training, device
        self.storage, self.checkpoints, self.should_stop = storage, checkpoints, should_stop
        self.train_films = Films(cohort[cohort["role"] == "train"], images, device)
        self.val_films = Films(cohort[cohort["role"] == "val"], images, device)
        self.shown_films = self.train_films
        if self.settings.augmentation == "published":
            self.shown_films = AugmentedFilms(self.train_films, lambda copy: self.stream("augmentation", copy))
        self.test_films = Films(tests.drop_duplicates("image_id"), images, device)
        self.tests = tests

        seed = stream_seed(spec.study_seed, "initialisation", spec.task, spec.h1_share, spec.seed)
        self.model = ProtoPNet.from_settings(spec.model, seed).to(device)
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (the stubs lack it)
        self.optimizers = build_optimizers(self.model, self.settings)
        self.at = Position()
        self.loss_sums = torch.zeros(len(LossTerms._fields), dtype=torch.float64, device=device)  # of this epoch
        self.best: dict[str, Tensor] = {}  # the selected network
        self.scores: dict[str, Tensor] = {}  # similarities of shown and val films, kept while the last layer is trained
        self.told = -math.inf  # when the last event was
        self.images_per_second: float | None = None
        n_bytes = 4 * sum(t.nbytes for t in self.model.state_dict().values())  # network, two moments, best network
        self.clock = CheckpointClock(self.settings.checkpoint_share, n_bytes, checkpoint_pause)

    def run(self) -> dict[str, Any]:
        """Warm up, train jointly, project, train the last layer; keep the best on validation; test it."""
        settings, at = self.settings, self.resume()
        try:
            while at.epoch < settings.epochs:
                if at.phase == "train":
                    self.train_epoch(stage_of(at.epoch, settings))
                    at.phase = "projection" if projects_after(at.epoch + 1, settings) else "train"
                if at.phase == "projection":
                    self.project()
                    at.phase = "last_layer"
                while at.phase == "last_layer" and at.last_layer_epoch < last_layer_epochs_after(
                    at.epoch + 1, settings
                ):
                    self.train_last_layer_epoch()
                at.epoch, at.phase, at.last_layer_epoch, self.scores = at.epoch + 1, "train", 0, {}
        except _DivergedError as error:
            return self.finish_diverged(str(error))
        return self.finish()

    def train_epoch(self, stage: Literal["warm", "joint"]) -> None:
        """Train one epoch of the warm or joint stage, then validate."""
        films, optimizer, bf16 = self.shown_films, self.optimizers[stage], self.settings.precision == "bf16"
        set_stage(self.model, stage, self.settings)
        set_learning_rates(optimizer, self.at.epoch, self.settings)
        for index in self.steps(stage, self.at.epoch):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                maps = self.model.backbone(films.batch(index))  # n, C, h, w
            output = self.model.head(maps.float())
            self.update(optimizer, loss_terms(output, films.labels[index], self.model, self.settings), len(index))
        losses = self.mean_losses()
        self.validate(stage, self.similarities(self.val_films), losses)

    def project(self) -> None:
        """Move each prototype onto its nearest training patch of its class: the first state that may be selected.

        With frozen batch norm all features stay what they are until joint training goes on.  So this pass over the
        films is also the last: the last-layer stage trains on the similarities found here (method.md a.7).
        """
        train, val = self.features(self.train_films), self.features(self.val_films)  # N, D, h, w
        record = project_features(self.model, train, self.train_films.labels, self.train_films.ids)
        self.at.record = dataclasses.asdict(record)
        self.scores = {"val": self.compare(val)}  # N, P
        if self.shown_films is self.train_films:
            self.scores["shown"] = self.compare(train)
        self.validate("projection", self.scores["val"])

    def train_last_layer_epoch(self) -> None:
        """Train only the last layer for one epoch, then validate: this state may be selected as well."""
        films, frozen, at = self.shown_films, self.settings.last_layer_bn == "frozen", self.at
        if frozen and "shown" not in self.scores:
            self.scores["shown"] = self.similarities(films)
        set_stage(self.model, "last_layer", self.settings)
        for index in self.steps("last_layer", at.epoch, at.last_layer_epoch):
            scores = self.scores["shown"][index] if frozen else self.model(films.batch(index)).similarities  # n, P
            logits = self.model.last_layer(scores)
            losses = last_layer_loss(logits, films.labels[index], self.model, self.settings)
            self.update(self.optimizers["last_layer"], losses, len(index))
        losses = self.mean_losses()
        losses = {name: losses[name] for name in ("loss", "cross_entropy", "l1", "train_accuracy")}  # what W can move
        scores = self.scores["val"] if frozen else self.similarities(self.val_films)
        at.last_layer_epoch += 1
        self.validate("last_layer", scores, losses)

    def finish(self) -> dict[str, Any]:
        """Test the selected network and write the trial's files, result.json last."""
        self.model.load_state_dict(self.best)
        self.event("evaluate")
        logits = self.model.last_layer(self.similarities(self.test_films)).detach().cpu().numpy()
        predictions = trial_files.prediction_table(self.tests, self.test_films.ids, logits)
        selected = dict(self.at.selected)
        prototypes = trial_files.prototype_table(
            selected.pop("record"), self.spec.model.prototypes_per_class, self.train_films.rows
        )
        trial_files.write_model(self.storage, self.best)
        self.storage.write_table(trial_files.PROTOTYPES, prototypes)
        self.storage.write_table(trial_files.PREDICTIONS, predictions)
        result = self.write_result("finished", selected=selected, tests=trial_files.accuracy_by_test_set(predictions))
        self.event("finished", val_accuracy=selected["val_accuracy"])
        return result

    def finish_diverged(self, reason: str) -> dict[str, Any]:
        result = self.write_result("diverged", reason=reason)
        self.event("diverged", message=reason)
        return result

    def write_result(self, status: Literal["finished", "diverged"], **more: Any) -> dict[str, Any]:
        spec = self.spec
        names = ("trial_id", "study", "task", "h1_share", "seed", "cohort_seed", "axes", "numerics_version")
        return trial_files.write_result(
            self.storage,
            {
                "status": status,
                **{name: getattr(spec, name) for name in names},
                "n_train": len(self.train_films),
                "n_val": len(self.val_films),
                "weights": self.at.weights,
                "history": self.at.history,
                **more,
            },
        )

    # Steps and passes

    def steps(self, stage: str, *epoch: int) -> Iterator[Tensor]:
        """Yield the epoch's remaining batches as (n,) positions; between two of them the trial may be stopped."""
        order = torch.from_numpy(self.stream("order", stage, *epoch).permutation(len(self.shown_films))).to(self.device)
        batches = order.split(self.settings.batch_size)[self.at.step :]
        began = time.monotonic()
        for n, index in enumerate(batches, start=1):
            yield index
            self.at.step += 1
            if stage != "last_layer":
                self.images_per_second = n * self.settings.batch_size / (time.monotonic() - began)
            self.poll()

    def stream(self, purpose: str, *key: str | int) -> np.random.Generator:
        """Return a generator that the arms of an ablation share (DESIGN.md rule 4)."""
        spec = self.spec
        return stream(spec.study_seed, purpose, spec.task, spec.h1_share, spec.seed, *key)

    def update(self, optimizer: torch.optim.Optimizer, losses: LossTerms, n: int) -> None:
        """Take one step down the total loss and add the terms to the epoch's sums, without waiting for the device."""
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        optimizer.step()
        means = torch.stack(losses[:-1]).detach().double()
        self.loss_sums += torch.cat([n * means, losses.correct.double()[None]])

    def mean_losses(self) -> dict[str, float]:
        """Return the epoch's mean loss terms; here, once an epoch, a diverged loss is seen."""
        means = (self.loss_sums / len(self.shown_films)).tolist()
        if not all(map(math.isfinite, means)):
            raise _DivergedError(f"the loss is not finite in epoch {self.at.epoch + 1}")
        *terms, correct = means
        return {**dict(zip(("loss", *LossTerms._fields[1:-1]), terms, strict=True)), "train_accuracy": 100 * correct}

    def features(self, films: Films) -> Tensor:
        """Return the add-on features of all films, (N, D, h, w), in eval mode; here a hidden overflow is seen."""

        def evaluate(batch: Tensor) -> Tensor:
            try:
                return self.model.features(batch, finite=True)
            except ValueError as error:
                raise _DivergedError(f"the network overflows in epoch {self.at.epoch + 1}: {error}") from error

        return torch.cat(list(self.chunks(films, evaluate)))

    def similarities(self, films: Films | AugmentedFilms) -> Tensor:
        """Return the similarities of all films to all prototypes, (N, P), in eval mode."""
        return torch.cat(list(self.chunks(films, lambda batch: self.model(batch).similarities)))

    @torch.no_grad()
    def compare(self, features: Tensor) -> Tensor:
        """Return the same similarities, (N, P), from features (N, D, h, w)."""
        chunks = features.split(self.settings.evaluation_batch_size)
        return torch.cat([self.model.compare(z).similarities for z in chunks])

    def chunks(self, films: Films | AugmentedFilms, evaluate: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """Yield what the network says of all films in order, chunk by chunk; between two it may be stopped."""
        self.model.eval()
        for batch in films.batches(self.settings.evaluation_batch_size):
            with torch.no_grad():
                yield evaluate(batch)
            self.poll()

    @torch.no_grad()
    def validate(self, stage: str, scores: Tensor, losses: dict[str, float] | None = None) -> None:
        """Close an epoch: accuracy on validation into the history and, of a projected state, into the selection."""
        at = self.at
        logits = self.model.last_layer(scores)  # N, C
        cross_entropy = float(F.cross_entropy(logits.double(), self.val_films.labels))
        if not math.isfinite(cross_entropy):
            raise _DivergedError(f"the validation loss is not finite in epoch {at.epoch + 1}")
        correct = int((logits.argmax(dim=1) == self.val_films.labels).sum())
        quality = {"val_accuracy": 100 * correct / len(self.val_films), "val_cross_entropy": cross_entropy}
        epoch = {"stage": stage, "epoch": at.epoch + 1}
        if stage in ("projection", "last_layer"):
            epoch["last_layer_epoch"] = at.last_layer_epoch
            if is_better(quality, at.selected):
                at.selected = {**epoch, **quality, "record": at.record}
                self.best = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        at.history.append({**epoch, **(losses or {}), **quality})
        at.step = 0
        self.loss_sums.zero_()
        name = stage if stage in ("projection", "last_layer") else "epoch"
        self.event(name, **{**epoch, **(losses or {}), **quality})

    # Interruption

    def poll(self) -> None:
        """Between two steps: stop when asked to, keep a checkpoint when one is due."""
        if self.should_stop():
            self.save()
            self.event("interrupted")
            raise TrialInterrupted(f"{self.spec.trial_id} was interrupted in epoch {self.at.epoch + 1}")
        if self.clock.due():
            self.save()
        if time.monotonic() > self.told + 6 * TOLD_SECONDS:
            self.event("progress", step=self.at.step)

    def save(self) -> None:
        began = time.monotonic()
        sums = {"losses": self.loss_sums}
        tensors = pack(self.model, self.optimizers, best=self.best, scores=self.scores, sums=sums)
        n_bytes = self.checkpoints.write(tensors, dataclasses.asdict(self.at))
        seconds = time.monotonic() - began
        self.clock.wrote(seconds)
        self.event("checkpoint", seconds=seconds, bytes=n_bytes)

    def resume(self) -> Position:
        """Go on from the newest whole checkpoint, or start."""
        found, problems = self.checkpoints.latest()
        for problem in problems:
            self.event("checkpoint_damaged", message=problem)
        if found is None:
            self.at.weights = start_from_weights(self.model, self.spec.model)
            self.event("started")
            return self.at
        self.at = Position(**found.state)
        groups = unpack(found.tensors, self.model, self.optimizers)
        self.best, self.scores = (
            {name: t.to(self.device, copy=True) for name, t in groups.get(group, {}).items()}
            for group in ("best", "scores")
        )
        self.loss_sums.copy_(groups["sums"]["losses"])
        self.event("resumed", step=self.at.step)
        return self.at

    def event(self, name: str, **more: Any) -> None:
        """Append to the trial's events; they alone know times.  Of quick last-layer epochs only the last is told."""
        at, settings, now = self.at, self.settings, time.monotonic()
        if name == "last_layer" and at.last_layer_epoch < settings.last_layer_epochs and now < self.told + TOLD_SECONDS:
            return
        self.told = now
        stage = stage_of(at.epoch, settings) if at.epoch < settings.epochs else "evaluate"
        known = {
            "stage": stage if at.phase == "train" else at.phase,
            "epoch": at.epoch,
            "epochs": settings.epochs,
            "images_per_second": self.images_per_second,
        }
        self.storage.append_event("events", {"time": time.time(), "event": name, **known, **more})
