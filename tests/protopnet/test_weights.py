import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from raystudy.errors import StudyError
from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.settings import ModelSettings
from raystudy.protopnet.weights import imagenet_file, start_from_weights
from raystudy.torchvision_shim import models


def resnet18() -> dict[str, torch.Tensor]:
    """Stand-in weights under torchvision's names, fc included."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return models.resnet18(weights=None).state_dict()


def settings(weights: str) -> ModelSettings:
    return ModelSettings("resnet18", weights, prototypes_per_class=2, prototype_dim=4, backbone_layers=3)


def test_no_weights_leave_the_network_as_it_is() -> None:
    model = ProtoPNet.from_settings(settings("none"), seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert start_from_weights(model, settings("none")) == "none"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_file_of_torchvisions_names_fills_the_backbone_and_nothing_else(tmp_path: Path) -> None:
    file, weights = tmp_path / "w.safetensors", resnet18()
    safetensors.torch.save_file(weights, file)
    model = ProtoPNet.from_settings(settings(str(file)), seed=1)
    prototypes = model.prototypes.detach().clone()
    assert start_from_weights(model, settings(str(file))) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert torch.equal(model.backbone.state_dict()["layer3.1.conv2.weight"], weights["layer3.1.conv2.weight"])
    assert torch.equal(model.prototypes, prototypes)


def test_old_files_without_counters_are_read(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file({k: v for k, v in resnet18().items() if "num_batches" not in k}, file)
    start_from_weights(ProtoPNet.from_settings(settings(str(file))), settings(str(file)))


def test_imagenet_weights_come_from_torchvisions_cache_and_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model, weights = ProtoPNet.from_settings(settings("imagenet")), resnet18()
    with pytest.raises(StudyError, match=r"(?s)cannot be read: No such file.*fetch it once on this machine"):
        start_from_weights(model, settings("imagenet"))
    file = imagenet_file("resnet18")
    assert file == tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    torch.save(weights, file)
    with pytest.raises(StudyError, match="does not match the checksum in its name"):
        start_from_weights(model, settings("imagenet"))
    promised = file.with_name(f"resnet18-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth")
    file.rename(promised)
    monkeypatch.setattr("raystudy.protopnet.weights.imagenet_file", lambda backbone: promised)
    assert start_from_weights(model, settings("imagenet")) == "imagenet"
    assert torch.equal(model.backbone.state_dict()["conv1.weight"], weights["conv1.weight"])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda w: w.pop("layer2.0.conv1.weight"), r"the file lacks layer2.0.conv1.weight"),
        (lambda w: w.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}), r"the file has conv1.weight of shape"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(tmp_path: Path, change, rule: str) -> None:
    file, weights = tmp_path / "w.safetensors", resnet18()
    change(weights)
    safetensors.torch.save_file(weights, file)
    with pytest.raises(StudyError, match=rule):
        start_from_weights(ProtoPNet.from_settings(settings(str(file))), settings(str(file)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_any_training(tmp_path: Path, value: float) -> None:
    file, weights = tmp_path / "w.safetensors", resnet18()
    weights["layer2.0.bn1.running_var"][3] = value
    safetensors.torch.save_file(weights, file)
    with pytest.raises(ValueError, match=r"w\.safetensors: weights must be finite: .*bn1\.running_var") as refusal:
        start_from_weights(ProtoPNet.from_settings(settings(str(file))), settings(str(file)))
    assert isinstance(refusal.value, StudyError)


def test_a_file_that_is_missing_or_no_safetensors_is_refused(tmp_path: Path) -> None:
    model = ProtoPNet.from_settings(settings("none"))
    with pytest.raises(StudyError, match="cannot be read: No such file"):
        start_from_weights(model, settings(str(tmp_path / "absent")))
    (tmp_path / "torn").write_bytes(b"\x10\x00")
    with pytest.raises(StudyError, match="no safetensors file"):
        start_from_weights(model, settings(str(tmp_path / "torn")))
