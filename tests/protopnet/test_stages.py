"""Schedule, optimisers and modes (method.md a.3, a.7, e 15, e 17)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.losses import last_layer_loss, loss_terms
from raystudy.protopnet.settings import TrainingSettings
from raystudy.protopnet.stages import (
    Stage,
    build_optimizers,
    epoch_plan,
    joint_factor,
    learning_rates,
    projects_after,
    set_learning_rates,
    set_stage,
    stage_of,
)

STAGES: tuple[Stage, ...] = ("warm", "joint", "last_layer")
LABELS = torch.tensor([0, 1, 0, 1])


def network() -> ProtoPNet:
    return ProtoPNet("resnet18", 2, 2, 6, 1, seed=1).eval()


def films() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


# Epoch, stage, exponent of 0.1 in the joint rates, projection after it: the paper's 50 epochs, written out.
PAPER = [
    *[(e, "warm", None, False) for e in range(5)],
    *[(e, "joint", 0, False) for e in (5, 6, 7, 8)],
    (9, "joint", 1, True),
    *[(e, "joint", 1, False) for e in (10, 11, 12, 13)],
    *[(e, "joint", 2, False) for e in (14, 15, 16, 17, 18)],
    (19, "joint", 3, True),
    *[(e, "joint", 3, False) for e in (20, 21, 22, 23)],
    *[(e, "joint", 4, False) for e in (24, 25, 26, 27, 28)],
    (29, "joint", 5, True),
    *[(e, "joint", 5, False) for e in (30, 31, 32, 33)],
    *[(e, "joint", 6, False) for e in (34, 35, 36, 37, 38)],
    (39, "joint", 7, True),
    *[(e, "joint", 7, False) for e in (40, 41, 42, 43)],
    *[(e, "joint", 8, False) for e in (44, 45, 46, 47, 48)],
    (49, "joint", 9, True),
]


def test_the_plan_of_fifty_epochs_is_the_papers() -> None:
    plan = epoch_plan(TrainingSettings())
    assert [(p.epoch, p.stage, p.projects) for p in plan] == [(e, stage, push) for e, stage, _, push in PAPER]
    for planned, (_, stage, exponent, _) in zip(plan, PAPER, strict=True):
        if stage == "warm":
            assert planned.learning_rates == {"add_on": 3e-3, "prototypes": 3e-3}
        else:
            wanted = {"backbone": 1e-4, "add_on": 3e-3, "prototypes": 3e-3}
            assert planned.learning_rates == pytest.approx({k: v * 0.1**exponent for k, v in wanted.items()}, rel=1e-9)


def test_an_offset_of_one_projects_where_the_published_code_does() -> None:
    settings = TrainingSettings(projection_offset=1)
    pushed = [p.epoch + 1 for p in epoch_plan(settings) if p.projects]
    assert pushed == [11, 21, 31, 41]  # completed epochs; the published loop pushes at epochs 10, 20, 30, 40
    assert not projects_after(1, settings)


def test_step_schedule_is_stepped_before_each_joint_epoch() -> None:
    # torch's own StepLR, driven as the published loop drives it
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    settings = TrainingSettings(step_epochs=3, step_gamma=0.5)
    for k in range(12):
        optimizer.step()
        scheduler.step()
        assert joint_factor(k, settings) == pytest.approx(scheduler.get_last_lr()[0])


def test_constant_and_cosine_schedules() -> None:
    settings = TrainingSettings(epochs=12, warm_epochs=2, projection_interval=4, schedule="cosine")
    factors = [joint_factor(k, settings) for k in range(10)]
    assert factors[0] == 1
    assert factors[5] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in pairwise(factors))
    assert factors[9] == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))
    constant = TrainingSettings(schedule="constant")
    assert {joint_factor(k, constant) for k in range(45)} == {1.0}


def test_a_study_without_warm_epochs_starts_jointly() -> None:
    settings = TrainingSettings(epochs=10, warm_epochs=0)
    assert stage_of(0, settings) == "joint"
    assert learning_rates(0, settings)["backbone"] == 1e-4


def names_in(optimizer: torch.optim.Optimizer, model: ProtoPNet) -> dict[str, set[str]]:
    names = {p: n for n, p in model.named_parameters()}
    return {str(g["name"]): {names[p] for p in g["params"]} for g in optimizer.param_groups}


def test_every_optimizer_holds_its_stages_parameters_and_the_last_layer_only_in_its_own() -> None:
    model = network()
    optimizers = build_optimizers(model, TrainingSettings())
    backbone = {f"backbone.{n}" for n, _ in model.backbone.named_parameters()}
    add_on = {f"add_on.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    assert names_in(optimizers["warm"], model) == {"add_on": add_on, "prototypes": {"prototypes"}}
    assert names_in(optimizers["joint"], model) == {
        "backbone": backbone,
        "add_on": add_on,
        "prototypes": {"prototypes"},
    }
    assert names_in(optimizers["last_layer"], model) == {"last_layer": {"last_layer.weight"}}


def test_decay_lies_on_backbone_and_add_on_alone() -> None:
    settings = TrainingSettings(weight_decay=0.02, lr_last_layer=0.5, lr_backbone=0.25)
    optimizers = build_optimizers(network(), settings)
    decay = {s: {g["name"]: g["weight_decay"] for g in optimizers[s].param_groups} for s in STAGES}
    assert decay["warm"] == {"add_on": 0.02, "prototypes": 0}
    assert decay["joint"] == {"backbone": 0.02, "add_on": 0.02, "prototypes": 0}
    assert decay["last_layer"] == {"last_layer": 0}
    for optimizer in optimizers.values():
        assert type(optimizer) is torch.optim.Adam  # L2 in the gradient, not AdamW
        assert optimizer.defaults["betas"] == (0.9, 0.999)
        assert optimizer.defaults["eps"] == 1e-8
    assert optimizers["joint"].param_groups[0]["lr"] == 0.25
    assert optimizers["last_layer"].param_groups[0]["lr"] == 0.5


def test_rates_of_an_epoch_reach_the_optimizer_by_group() -> None:
    settings = TrainingSettings(lr_backbone=1.0, lr_add_on=2.0, lr_prototypes=3.0, lr_warm_add_on=4.0)
    optimizers = build_optimizers(network(), settings)
    set_learning_rates(optimizers["joint"], 14, settings)
    rates = {g["name"]: g["lr"] for g in optimizers["joint"].param_groups}
    assert rates == pytest.approx({"backbone": 0.01, "add_on": 0.02, "prototypes": 0.03})
    set_learning_rates(optimizers["warm"], 3, settings)
    assert [g["lr"] for g in optimizers["warm"].param_groups] == [4.0, 3e-3]


@pytest.mark.parametrize("bn", ["frozen", "published"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_its_parameters_in_its_mode(stage: Stage, bn: str) -> None:
    settings = TrainingSettings(last_layer_bn=bn)
    model = network()
    set_stage(model, stage, settings)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set().union(*names_in(build_optimizers(model, settings)[stage], model).values())
    assert {m.training for m in model.modules()} == {stage != "last_layer" or bn == "published"}


def train(model: ProtoPNet, stage: Stage, settings: TrainingSettings, steps: int = 2) -> None:
    optimizer = build_optimizers(model, settings)[stage]
    set_stage(model, stage, settings)
    scores = None
    if stage == "last_layer" and settings.last_layer_bn == "frozen":
        with torch.no_grad():
            scores = model(films()).similarities
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        if scores is None:
            loss_terms(model(films()), LABELS, model, settings).total.backward()
        else:
            last_layer_loss(model.last_layer(scores), LABELS, model, settings).total.backward()
        optimizer.step()
    model.eval()


def running(model: ProtoPNet) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "running" in n}


@pytest.mark.parametrize("stage", ["warm", "joint"])
def test_warm_and_joint_training_leave_the_last_layer_and_move_running_statistics(stage: Stage) -> None:
    model = network()
    last_layer, before = model.last_layer.weight.detach().clone(), running(model)
    train(model, stage, TrainingSettings())
    assert torch.equal(model.last_layer.weight, last_layer)
    assert all(not torch.equal(t, before[n]) for n, t in running(model).items())


@torch.no_grad()
def distances(model: ProtoPNet) -> Tensor:
    return model.eval()(films()).distances


@pytest.mark.parametrize(("bn", "same"), [("frozen", True), ("published", False)])
def test_distances_outlast_the_last_layer_stage_only_with_frozen_batch_norm(bn: str, same: bool) -> None:
    settings = TrainingSettings(last_layer_bn=bn, lr_last_layer=0.1)
    model = network()
    train(model, "joint", settings)  # running statistics that are not yet settled
    before, weight = distances(model), model.last_layer.weight.detach().clone()
    statistics = running(model)
    train(model, "last_layer", settings, steps=3)
    assert torch.equal(distances(model), before) is same
    assert all(torch.equal(t, statistics[n]) is same for n, t in running(model).items())
    assert not torch.equal(model.last_layer.weight, weight)


def test_cached_scores_train_the_last_layer_as_the_whole_network_in_eval_mode_would() -> None:
    settings = TrainingSettings(lr_last_layer=0.05)
    cached, whole = network(), network()
    train(cached, "last_layer", settings, steps=5)
    optimizer = build_optimizers(whole, settings)["last_layer"]
    set_stage(whole, "last_layer", settings)
    for _ in range(5):
        optimizer.zero_grad(set_to_none=True)
        loss_terms(whole(films()), LABELS, whole, settings).total.backward()
        optimizer.step()
    torch.testing.assert_close(cached.last_layer.weight, whole.last_layer.weight, atol=1e-6, rtol=1e-6)
