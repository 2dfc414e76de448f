"""What a backbone starts from: nothing, torchvision's ImageNet file, or a safetensors file (method.md a.7).

Nothing is downloaded here.  ``imagenet`` is the file that torchvision keeps in its own cache, and is read only when it
carries the checksum that torchvision's name for it promises.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from raystudy.errors import DamagedFileError, StudyError
from raystudy.protopnet.model import ProtoPNet
from raystudy.protopnet.settings import ModelSettings


def imagenet_file(backbone: str) -> Path:
    """Return where torchvision keeps its ImageNet weights of a ResNet; the file need not be there."""
    from raystudy.torchvision_shim import models

    url = models.get_model_weights(backbone).IMAGENET1K_V1.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def start_from_weights(model: ProtoPNet, settings: ModelSettings) -> str:
    """Load the initial weights of the backbone.

    Returns
    -------
    ``none``, ``imagenet`` or the SHA-256 of the file.

    Raises
    ------
    StudyError : the file is missing, damaged, or of another network.
    """
    if settings.weights == "none":
        return "none"
    if settings.weights == "imagenet":
        path, identity = imagenet_file(settings.backbone), "imagenet"
        remedy = (
            "fetch it once on this machine: python -c 'from raystudy.torchvision_shim import torchvision as t; "
            f't.models.{settings.backbone}(weights="IMAGENET1K_V1")\', or set model.weights to a file or to none'
        )
    else:
        path, identity = Path(settings.weights), ""
        remedy = "name a safetensors file with torchvision's names, or `none` or `imagenet`"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StudyError(f"the weights cannot be read: {error.strerror}", where=str(path), remedy=remedy) from error
    sha256 = hashlib.sha256(data).hexdigest()
    if identity == "imagenet":
        promised = path.stem.rsplit("-", 1)[-1]
        if not sha256.startswith(promised):
            raise StudyError("the file does not match the checksum in its name", where=str(path), remedy=remedy)
        # torchvision publishes this file as a pickle: the checksum is its name's, and weights_only runs no code of it.
        loaded: dict[str, Tensor] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    else:
        try:
            loaded = safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise StudyError(f"this is no safetensors file: {error}", where=str(path), remedy=remedy) from error
    _load(model, loaded, path)
    return identity or sha256


def _load(model: ProtoPNet, loaded: dict[str, Tensor], path: Path) -> None:
    wanted = model.backbone.state_dict()
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}  # absent from old files
    missing = sorted(name for name in wanted.keys() - counters if name not in loaded)
    wrong = sorted(n for n in wanted.keys() & loaded.keys() if wanted[n].shape != loaded[n].shape)
    if missing or wrong:
        what = f"lacks {missing[0]}" if missing else f"has {wrong[0]} of shape {tuple(loaded[wrong[0]].shape)}"
        raise StudyError(
            f"these are weights of another network: the file {what}",
            where=str(path),
            remedy="use weights of the backbone that model.backbone names",
        )
    values = {name: loaded[name] for name in wanted if name in loaded}
    odd = next((n for n, v in values.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())), None)
    if odd is not None:
        raise DamagedFileError(
            f"weights must be finite: {odd} holds a NaN or an infinity", where=str(path), remedy="use another file"
        )
    model.backbone.load_state_dict({**{name: wanted[name] for name in counters}, **values})
