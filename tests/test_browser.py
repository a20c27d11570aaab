"""The page that trains in a browser: in a real one, beside PyTorch in float64."""

from __future__ import annotations

import functools
import json
import queue
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import browser_training
from _demo_data import read_digits
from _demo_training import with_tract
from browser_training import SETTINGS, Handler, net

SCRIPT = Path(browser_training.__file__)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
SECONDS = 240


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CHROMIUM is None or shutil.which("npm") is None:
        pytest.skip("needs Chromium and npm")
    pytest.importorskip("onnxruntime", reason="the step is made by its help")
    folder = tmp_path_factory.mktemp("page")
    _prepare_as_a_user(folder)
    return folder


def test_it_trains_as_pytorch_does(page: Path, tmp_path: Path) -> None:
    result, weights = _trained(page, tmp_path, "epochs=1", "--disable-gpu")
    assert "error" not in result, result
    _assert_pytorch_s(result, weights)
    assert result["accuracies"][-1] > result["accuracies"][0] + 20
    digits = read_digits()
    trained = net(digits)
    trained.load_state_dict(weights)
    with torch.no_grad():
        right = trained.eval()(digits.test.images).argmax(1) == digits.test.labels
    assert 100 * right.double().mean().item() == pytest.approx(result["accuracies"][-1], abs=0.5)


def test_it_trains_by_webgpu(page: Path, tmp_path: Path) -> None:
    """On whatever GPU is there, or on the one that Chromium makes of the CPU."""
    flags = ("--enable-unsafe-webgpu", "--enable-features=Vulkan")
    adapter = "--use-webgpu-adapter=swiftshader"
    asked = "epochs=1&steps=4&provider=webgpu"
    result, weights = _trained(page, tmp_path, asked, *flags, adapter)
    if "adapter" in str(result.get("error")):
        pytest.skip("no adapter for WebGPU")
    assert "error" not in result, result
    assert len(result["losses"]) == 4
    _assert_pytorch_s(result, weights)


def _trained(
    page: Path, profile: Path, asked: str, *flags: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the page tells in a browser, and the weights that it saves."""
    posted: queue.Queue[tuple[str, bytes]] = queue.Queue()

    class Listening(Handler):
        def do_POST(self) -> None:  # noqa: N802 (http.server's name)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(204)
            self.end_headers()
            posted.put((self.path, body))

    handler = functools.partial(Listening, directory=str(page))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/?report&{asked}"
        options = ("--headless=new", "--no-sandbox", f"--user-data-dir={profile}", *flags)
        browser = subprocess.Popen(
            [str(CHROMIUM), *options, "--remote-debugging-port=0", address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            path, body = posted.get(timeout=SECONDS)
            weights = load(body) if path == "/weights" else {}
            result = json.loads(body if path == "/result" else posted.get(timeout=SECONDS)[1])
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
    return result, weights


def _prepare_as_a_user(folder: Path) -> None:
    command = [sys.executable, "-u", str(SCRIPT), "--folder", str(folder), "--port", "0"]
    # A shell's background jobs ignore Ctrl+C, and so would what they start.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "preexec_fn": heed}
    with subprocess.Popen(command, **options) as process:
        try:
            assert process.stdout is not None
            address = next(line for line in process.stdout if line.startswith("Open ")).split()[1]
            with urllib.request.urlopen(address, timeout=SECONDS) as page:
                assert b"train.mjs" in page.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()


def _assert_pytorch_s(result: Any, weights: dict[str, torch.Tensor]) -> None:
    digits = read_digits()
    model = with_tract(net(digits), SETTINGS).double()
    optimizer = torch.optim.SGD(
        model.parameters(),
        SETTINGS.learning_rate,
        SETTINGS.momentum,
        weight_decay=SETTINGS.weight_decay,
    )
    order = _shuffled(len(digits.train.labels), 1)
    for step, found in enumerate(result["losses"][:12]):
        chosen = order[step * 64 : (step + 1) * 64]
        optimizer.zero_grad()
        output = model(digits.train.images[chosen].double())
        loss = F.cross_entropy(output, digits.train.labels[chosen])
        loss.backward()
        optimizer.step()
        assert found == pytest.approx(loss.item(), rel=2e-4), step
    assert result["losses"] != result["plain"]
    if len(result["losses"]) <= 12:
        for name, value in model.named_parameters():
            assert (weights[name] - value).norm() < 1e-4 * value.norm(), name
    assert int(weights["norm1.num_batches_tracked"]) == len(result["losses"])


def _shuffled(count: int, seed: int) -> list[int]:
    """The page's own order."""
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        seed = (seed * 1664525 + 1013904223) % 2**32
        j = seed % (i + 1)
        order[i], order[j] = order[j], order[i]
    return order
