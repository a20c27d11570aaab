"""The images of `cifar.py`: read once, kept as one file, and augmented in batches on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from _cifar_files import write_tensors
from _demo_data import DataError, class_names, read_split

# CIFAR-10's mean and deviation by channel, of values in [0, 1], as in the authors' script.
MEAN = (0.4914, 0.4822, 0.4465)
DEVIATION = (0.2023, 0.1994, 0.2010)
MARGIN = 4


@dataclass(frozen=True)
class Images:
    """A data set as bytes.

    Attributes:
        classes: Their names, by label.
        train: `(N, 3, H, H)`, uint8.
        train_labels: `(N,)`, int64.
        test: As `train`.
        test_labels: As `train_labels`.
    """

    classes: tuple[str, ...]
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> Images:
        """Give the same images in the device's memory."""
        moved = (self.train, self.train_labels, self.test, self.test_labels)
        return Images(self.classes, *(tensor.to(device) for tensor in moved))


def load(
    data: Path | None, kept: Path, *, image_size: int, train_limit: int, test_limit: int
) -> Images:
    """Read `data/train/CLASS/*` and `data/test/CLASS/*`, or what was kept of an earlier reading.

    Args:
        data: The folder; None for what was kept, whatever it was.
        kept: The file that keeps the images.
        image_size: Images are scaled to this height and width, in pixels.
        train_limit: Number of training images to take, spread evenly over the classes; 0 for all.
        test_limit: The same for the test images.

    Returns:
        The images, in the memory of the CPU.

    Raises:
        DataError: The folder can't be read, or what was kept is of other images.
    """
    sizes = [image_size, train_limit, test_limit]
    if kept.is_file():
        found = torch.load(kept)
        name = found["name"] if data is None else data.resolve().name
        if (found["name"], found["sizes"]) != (name, sizes):
            raise DataError(
                f"{kept} holds images of {found['name']} (size and limits {found['sizes']}), not "
                f"of {name} ({sizes}): give another --out"
            )
        return Images(tuple(found["classes"]), *found["tensors"])
    if data is None:
        raise DataError(f"{kept.parent} holds no images yet: give --data")
    classes = class_names(data)
    train = read_split(data / "train", classes, image_size, train_limit)
    test = read_split(data / "test", classes, image_size, test_limit)
    tensors = [train.images, train.labels, test.images, test.labels]
    record = {"name": data.resolve().name, "sizes": sizes, "classes": [*classes]}
    write_tensors(kept, record | {"tensors": tensors})
    return Images(classes, *tensors)


def standardise(pixels: Tensor) -> Tensor:
    """Turn bytes `(N, 3, H, W)` into standardised float32, laid out with the channels last."""
    mean, deviation = _moments(pixels.device)
    scaled = (pixels / 255 - mean) / deviation
    return scaled.contiguous(memory_format=torch.channels_last)


@cache
def _moments(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation on the device; a copy at every step would wait for it."""
    mean, deviation = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return mean, deviation


class Crops:
    """Random crops of the training images with a black margin of 4 pixels, half of them flipped."""

    def __init__(self, images: Tensor) -> None:
        """Take the training images, `(N, 3, H, H)`, uint8."""
        self.size = images.shape[-1]
        self.padded = F.pad(images, (MARGIN,) * 4)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Draw how each image is cut: row and column of the corner and whether it is flipped.

        Args:
            generator: Of the device of the images.

        Returns:
            `(N, 3)`, int64.
        """
        count, device = len(self.padded), self.padded.device
        corners = torch.randint(2 * MARGIN + 1, (count, 2), generator=generator, device=device)
        flips = torch.randint(2, (count, 1), generator=generator, device=device)
        return torch.cat([corners, flips], dim=1)

    def batch(self, chosen: Tensor, cuts: Tensor) -> Tensor:
        """Cut a batch.

        Args:
            chosen: Places of the images, `(B,)`.
            cuts: What `draw` has given for all images.

        Returns:
            `(B, 3, H, H)`, uint8.
        """
        row, column, flip = cuts[chosen].view(-1, 3, 1).unbind(1)
        along = torch.arange(self.size, device=chosen.device)
        columns = column + torch.where(flip.bool(), self.size - 1 - along, along)
        index = chosen.view(-1, 1, 1, 1), torch.arange(3, device=chosen.device).view(3, 1, 1)
        return self.padded[(*index, (row + along)[:, None, :, None], columns[:, None, None, :])]
