"""Writes relevance.npz: maps of the slow float64 oracle on a small network that is made from integers.

    python -m tests.golden.make_relevance

Weights and pictures come from plain PCG64 words, so that they do not depend on the versions of NumPy or torch.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from raystudy.protopnet import ProtoPNet
from tests.relevance.nets import narrow
from tests.relevance.oracle import SlowPRP

FILE = Path(__file__).with_name("relevance.npz")
PAIRS = ((0, 0), (0, 3), (1, 1))  # image, prototype
GAMMAS = (0.25, 0.25)


def uniform(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 values in [0, 1) with 16 bits each, from the stream of a name."""
    words = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    return torch.from_numpy((words >> np.uint64(48)).astype(np.float32) / np.float32(65536)).view(shape)


def small_net() -> ProtoPNet:
    """ResNet18 with 16 channels, three stages, 4 prototypes of 12 dimensions."""
    net = ProtoPNet("resnet18", 2, 2, 12, 3)
    narrow(net, 16)
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d):
                fan = module.weight[0].numel()
                module.weight.copy_((2 * uniform(f"{name}.weight", tuple(module.weight.shape)) - 1) * (6 / fan) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(0.2 * uniform(f"{name}.bias", tuple(module.bias.shape)) - 0.1)
            elif isinstance(module, nn.BatchNorm2d):
                shape = (module.num_features,)
                module.weight.copy_(0.5 + uniform(f"{name}.weight", shape))
                module.weight[1::8] *= -1
                module.bias.copy_(0.6 * uniform(f"{name}.bias", shape) - 0.3)
                module.running_mean = 0.6 * uniform(f"{name}.mean", shape) - 0.3
                module.running_var = 0.5 + 1.5 * uniform(f"{name}.var", shape)
        net.prototypes.copy_(uniform("prototypes", tuple(net.prototypes.shape)))
    return net.eval()


def small_images() -> torch.Tensor:
    """Two normalised images of 72 x 64 pixels."""
    pixels = torch.stack([uniform(f"image{i}", (3, 72, 64)) for i in range(2)])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def digest(net: ProtoPNet, images: torch.Tensor) -> str:
    """SHA-256 over names and bytes of everything that enters."""
    total = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        if tensor.is_floating_point() and not name.startswith("last_layer"):
            total.update(name.encode() + tensor.numpy().astype("<f4").tobytes())
    total.update(images.numpy().astype("<f4").tobytes())
    return total.hexdigest()


def main() -> None:
    net, images = small_net(), small_images()
    arrays: dict[str, np.ndarray] = {"pairs": np.array(PAIRS), "sha256": np.array(digest(net, images))}
    for name, power, gammas in (("power2", 2, ()), ("power4", 4, ()), ("gamma", 2, GAMMAS)):
        results = [SlowPRP(net, power, gammas)(images[i], j) for i, j in PAIRS]
        arrays[f"{name}_maps"] = np.stack([r[0].numpy().astype(np.float32) for r in results])
        arrays[f"{name}_features"] = np.stack([r[1].numpy() for r in results])
        arrays[f"{name}_cells"] = np.array([r[2] for r in results])
        arrays[f"{name}_scores"] = np.array([r[3] for r in results])
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
