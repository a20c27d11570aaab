"""Trainers that run a loop over micro-batches, and the same loop by hand, on one large batch."""

# No `from __future__ import annotations`: Lightning reads the types.

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

import oracle

STEPS, CLIP = 2, 1e-2
"""Optimizer steps, and the norm to which each is clipped."""

Example = tuple[Tensor, Tensor]
Run = Callable[[nn.Module, Sequence[Example], int, int, Path], None]
"""Trains a model for STEPS epochs of one step each; of micro-batches of that size, and so many."""


def examples(count: int, shape: Sequence[int]) -> list[Example]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn((count, *shape), generator=generator, dtype=torch.float64) + 0.5
    return [(image, torch.tensor(number % 5)) for number, image in enumerate(x)]


def loader_of(data: Any, batch: int) -> Any:
    return DataLoader(data, batch, shuffle=True)


def by_hand(model: Any, data: Sequence[Example], lambda_: float) -> nn.Module:
    """Train a plain model: one large batch a step, `first` by the oracle's TrAct."""
    model = copy.deepcopy(model)
    x, y = torch.stack([x for x, _ in data]), torch.stack([y for _, y in data])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        weight = model.first.weight
        tract = oracle.precondition(model.first, weight.grad, x, lambda_)
        weight.grad = torch.from_numpy(tract).reshape(weight.shape)
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model  # type: ignore[no-any-return]


def moved(before: nn.Module, after: nn.Module) -> Tensor:
    """How far training has moved the parameters."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return torch.cat([(b - a).detach().flatten() for a, b in pairs])


def with_accelerate(
    model: nn.Module, data: Sequence[Example], batch: int, count: int, folder: Path
) -> None:
    accelerator = import_module("accelerate").Accelerator(
        cpu=True, gradient_accumulation_steps=count
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader_of(data, batch))
    for _ in range(STEPS):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(functional.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()


class _WithLoss(nn.Module):
    """What the Trainer wants."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def with_trainer(
    model: nn.Module, data: Sequence[Example], batch: int, count: int, folder: Path
) -> None:
    transformers: Any = import_module("transformers")
    transformers.logging.set_verbosity_error()
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=STEPS,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=count,
        max_grad_norm=CLIP,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows: Any = [{"x": x, "labels": y} for x, y in data]
    transformers.Trainer(_WithLoss(model), arguments, train_dataset=rows).train()


def with_lightning(
    model: nn.Module, data: Sequence[Example], batch: int, count: int, folder: Path
) -> None:
    lightning: Any = import_module("lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp" if world > 1 else "auto",
        devices=world,
        max_epochs=STEPS,
        accumulate_grad_batches=count,
        gradient_clip_val=CLIP,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Classifier(), loader_of(data, batch))


TRAINERS: dict[str, Run] = {
    "accelerate": with_accelerate,
    "transformers": with_trainer,
    "lightning": with_lightning,
}


def load_trainers() -> None:
    """Import what there is of them, before processes are forked that need it."""
    for name in filter(find_spec, TRAINERS):
        import_module(name)
    with suppress(ImportError):
        import_module("transformers.trainer")
