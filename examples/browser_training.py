"""Train the demo's net in a browser, with TrAct and without: prepare the page and serve it.

    python examples/browser_training.py            # then open the address that it prints

It trains in WebAssembly; with `?provider=webgpu` behind the address, on the GPU. Needs the
extra `demo`, and npm for ONNX Runtime Web.
"""

from __future__ import annotations

import _named_extra  # noqa: F401  # isort: skip

import contextlib
import functools
import shutil
import subprocess
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_file
from torch import nn

from _demo_data import Dataset, read_digits
from _demo_training import Settings, initial_model, with_tract
from tract_fx import SGD, export_training

PAGE = Path(__file__).parent / "browser"
SETTINGS = Settings(
    epochs=10, seeds=1, lambda_=0.1, batch_size=64, learning_rate=0.02, weight_decay=5e-4
)


def net(digits: Dataset) -> nn.Module:
    """The demo's net with average pooling: of a max-pool WebGPU's kernel gives no places."""
    model = initial_model(digits, seed=0).train()
    for name, module in model.named_children():
        if isinstance(module, nn.MaxPool2d):
            setattr(model, name, nn.AvgPool2d(2))
    return model


def prepare(folder: Path) -> None:
    """Write the page, both models and the digits.

    Args:
        folder: Where to; what is there already is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in PAGE.iterdir():
        shutil.copy(file, folder)
    subprocess.run(
        ["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True
    )
    digits = read_digits()
    optimizer = SGD(
        lr=SETTINGS.learning_rate, momentum=SETTINGS.momentum, weight_decay=SETTINGS.weight_decay
    )
    model = net(digits)
    for name in ("plain", "tract"):
        export_training(
            with_tract(model, SETTINGS) if name == "tract" else model,
            digits.train.images[:8],
            folder / name,
            optimizer=optimizer,
            target="onnxruntime",
            plain=name == "plain",
            float64=False,  # which WebGPU has not
            overwrite=True,
        )
    tensors = {
        f"{kind}.{what}": getattr(getattr(digits, kind), what).contiguous()
        for kind in ("train", "test")
        for what in ("images", "labels")
    }
    save_file(tensors, folder / "digits.safetensors")


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; JavaScript modules as such, on every system."""

    extensions_map = {  # noqa: RUF012 (the base class's own)
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
    }

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def main(
    folder: Annotated[Path, typer.Option(help="Where the page is written.")] = Path(
        "build/browser"
    ),
    port: Annotated[int, typer.Option(help="Where it is served; 0: any free one.")] = 8000,
) -> None:
    """Prepare the page and serve it."""
    prepare(folder)
    handler = functools.partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        typer.echo(f"Open http://127.0.0.1:{server.server_port}/ (Ctrl+C ends)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    typer.run(main)
