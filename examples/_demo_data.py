"""The demo's data as standardised tensors: scikit-learn's digits, or a folder of images.

The digits as they are leave nothing to see: both arms end at 99 %. TrAct is about images of uneven
contrast and brightness, so by default each digit gets light of its own. That was chosen so that
TrAct's effect can show; it is no measure of the effect on other images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

UNEVEN_LIGHT = (
    "Each digit, of training and test, was given a contrast (a tenth to all of its own), a "
    "brightness and a slope of light. That was chosen so that TrAct's effect can show: on the "
    "digits as they are (--even-light) both arms end at 99 %."
)
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


class DataError(Exception):
    """The data that was asked for can't be read; the message is for the person at the shell."""


@dataclass(frozen=True)
class Split:
    """Images and labels of one half of a data set.

    Attributes:
        images: `(N, C, H, W)`, float32; uint8 as they are read.
        labels: `(N,)`, int64.
    """

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, standardised per channel over the training split.

    Attributes:
        name: What it is called in tables and plots.
        classes: Their names, by label.
        train: The training split.
        test: The test split.
        note: What was done to the images and why; empty for nothing.
        before: The training images before that, in the same order.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    note: str = ""
    before: torch.Tensor | None = None


def read_digits(*, uneven_light: bool = False) -> Dataset:
    """Read scikit-learn's 1,797 digits of 8 × 8 pixels; a fixed quarter is the test split.

    Args:
        uneven_light: Whether each image, of either split, gets light of its own.

    Returns:
        The data set, the same for the same argument.
    """
    digits = load_digits()
    halves = train_test_split(
        digits.images / 16, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    train, test, train_labels, test_labels = (torch.tensor(half) for half in halves)
    train, test = train.float().unsqueeze(1), test.float().unsqueeze(1)
    splits = Split(train, train_labels.long()), Split(test, test_labels.long())
    classes = tuple(map(str, digits.target_names))
    if not uneven_light:
        return _standardise("digits", classes, *splits)
    generator = torch.Generator().manual_seed(0)
    lit = (Split(light_unevenly(split.images, generator), split.labels) for split in splits)
    dataset = _standardise("digits in uneven light", classes, *lit)
    return replace(dataset, note=UNEVEN_LIGHT, before=train)


def light_unevenly(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Give each image a contrast, a brightness and a slope of light: `contrast · x + light`.

    Args:
        images: `(N, C, H, W)` in [0, 1].
        generator: Of what is drawn: contrasts from 0.1 to 1, uniform in their logarithm; the light
            in an image's middle from 0 to 1; its rise from there to the edge from 0 to 1, towards
            any side.

    Returns:
        Images of the same shape, in no range: nothing is clipped.
    """
    height, width = images.shape[2:]
    draws = torch.rand(4, len(images), 1, 1, 1, generator=generator)
    contrast, middle, rise, angle = 10 ** (draws[0] - 1), draws[1], draws[2], 2 * math.pi * draws[3]
    y, x = torch.linspace(-1, 1, height).view(-1, 1), torch.linspace(-1, 1, width)
    return contrast * images + middle + rise * (angle.cos() * x + angle.sin() * y)


def read_image_folder(
    folder: Path, *, image_size: int, train_limit: int, test_limit: int
) -> Dataset:
    """Read `folder/train/CLASS/*.jpg` and `folder/test/CLASS/*.jpg`.

    Args:
        folder: Holds `train` and `test`, each with one folder per class.
        image_size: Images are scaled to this height and width, in pixels.
        train_limit: Number of training images to keep, spread evenly over the classes; 0 keeps all.
        test_limit: The same for the test images.

    Returns:
        The data set; a class's label is its place in the sorted names of the folders under `train`.

    Raises:
        DataError: A folder is missing or empty, the classes differ, or an image can't be read.
    """
    classes = class_names(folder)
    return _standardise(
        folder.resolve().name,
        classes,
        _scaled(read_split(folder / "train", classes, image_size, train_limit)),
        _scaled(read_split(folder / "test", classes, image_size, test_limit)),
    )


def class_names(folder: Path) -> tuple[str, ...]:
    """List the classes under `folder/train`, by label; `DataError` where the folder has no two."""
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    classes = _names_in(folder / "train")
    if len(classes) < 2:
        raise DataError(
            f"{folder / 'train'}: one class alone ({classes[0]}) leaves nothing to learn"
        )
    unknown = sorted(set(_names_in(folder / "test")) - set(classes))
    if unknown:
        raise DataError(f"{folder / 'test'}: classes that train/ lacks: {', '.join(unknown)}")
    return classes


def _names_in(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder} (expected {folder.name}/CLASS/*.jpg)")
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not names:
        raise DataError(f"{folder}: no class folders in it (expected {folder.name}/CLASS/*.jpg)")
    return names


def read_split(folder: Path, classes: tuple[str, ...], image_size: int, limit: int) -> Split:
    """Read every class's images, or an even share of `limit` from each, as uint8."""
    share = -(-limit // len(classes))
    images: list[torch.Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(
            file for file in (folder / name).glob("*") if file.suffix.lower() in IMAGE_SUFFIXES
        )
        for file in files[:share] if limit else files:
            images.append(_read_image(file, image_size))
            labels.append(label)
    if not images:
        raise DataError(f"{folder}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return Split(torch.stack(images), torch.tensor(labels))


def _scaled(pixels: Split) -> Split:
    return Split(pixels.images.float() / 255, pixels.labels)


def _read_image(file: Path, image_size: int) -> torch.Tensor:
    """Read one image as uint8 `(3, image_size, image_size)`."""
    try:
        with Image.open(file) as image:
            scaled = image.convert("RGB").resize((image_size, image_size))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file}: not a readable image ({error})") from error
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)


def _standardise(name: str, classes: tuple[str, ...], train: Split, test: Split) -> Dataset:
    """Subtract each channel's mean and divide by its deviation, both of the training split."""
    deviation, mean = torch.std_mean(train.images, dim=(0, 2, 3), keepdim=True)
    deviation = deviation.clamp_min(1e-6)
    return Dataset(
        name,
        classes,
        Split((train.images - mean) / deviation, train.labels),
        Split((test.images - mean) / deviation, test.labels),
    )
