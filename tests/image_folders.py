"""Folders of small images, as examples/ and benchmarks/ read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image


def write_images(folder: Path, *, classes: Sequence[str] = ("cat", "dog")) -> Path:
    """Write an image folder of noise whose classes differ in their brightness."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(0, 128, (12, 10, 3), generator=generator) + 100 * label
                image = Image.fromarray(noise.to(torch.uint8).numpy())
                image.save(folder / split / name / f"{index}.png")
    return folder
