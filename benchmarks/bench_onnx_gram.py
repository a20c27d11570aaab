"""Time of the Gram in ONNX Runtime, in each form, beside the layer's own forward.

python benchmarks/bench_onnx_gram.py [--repeats 15] [--quick] [--out build/bench]

The two builds of ONNX Runtime share their import name. Where tract_fx is installed, its models are
written to OUT/onnx_gram; in another environment, with numpy and the other build alone, those are
measured. Both end in OUT/onnx_gram.json, by the build's version.

Needs the extra `test`, or numpy and the other build.
"""

from __future__ import annotations

import named_extra  # noqa: F401  # isort: skip

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from onnxruntime import InferenceSession, SessionOptions

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BUILDS = ("onnxruntime-training-cpu", "onnxruntime-training", "onnxruntime-gpu", "onnxruntime")
FORWARD = "forward"
Record = dict[str, Any]


def write_models(folder: Path) -> None:
    """Write all models, and a list of them."""
    from onnx_gram_models import LAYERS, forward_model, gram_models

    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for index, layer in enumerate(LAYERS):
        files = {FORWARD: f"{index}_{FORWARD}.onnx"}
        (folder / files[FORWARD]).write_bytes(forward_model(layer))
        forms = []
        for gram in gram_models(layer):
            files[gram.form] = f"{index}_{gram.form.replace(' ', '_')}.onnx"
            (folder / files[gram.form]).write_bytes(gram.model)
            marks = {"former": gram.former, "chosen": gram.chosen, "count": gram.count}
            forms.append({"form": gram.form, **marks})
        listed.append({"layer": layer.name, "shape": layer.shape, "files": files, "forms": forms})
    (folder / "models.json").write_text(json.dumps(listed, indent=2) + "\n")


def interleaved(
    sessions: Mapping[str, InferenceSession], x: np.ndarray[Any, Any], repeats: int
) -> dict[str, float]:
    """Median milliseconds by name; in each round every session runs once, two rounds before."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(repeats + 2):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"x": x})
            if turn > 1:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


def measure(entry: Record, folder: Path, repeats: int, *, quick: bool) -> Record:
    """One layer's forward, and its Gram in each form. ONNX Runtime's arena keeps its memory."""
    options = SessionOptions()
    options.intra_op_num_threads = THREADS
    # A session's threads that spin after it has run would take the next one's cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = {
        name: InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        for name, file in entry["files"].items()
    }
    batch, *rest = entry["shape"]
    shape = (max(1, batch // 8) if quick else batch, *rest)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    times = interleaved(sessions, x, repeats)
    forms = [{**form, "milliseconds": times[form["form"]]} for form in entry["forms"]]
    before, now = (
        next(form["milliseconds"] for form in forms if form[mark]) / times[FORWARD]
        for mark in ("former", "chosen")
    )
    return {
        "layer": entry["layer"],
        "shape": shape,
        "forward_milliseconds": times[FORWARD],
        "forms": forms,
        "gram_over_forward": {"before": before, "now": now},
    }


def build() -> str:
    """The installed build and its version."""
    for package in BUILDS:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "onnxruntime"


def print_layer(record: Record) -> None:
    """A line per form."""
    forward, ratio = record["forward_milliseconds"], record["gram_over_forward"]
    print(f"\n{record['layer']}: forward {forward:.2f} ms, ", end="")
    print(f"Gram ÷ forward {ratio['before']:.2f} before, {ratio['now']:.2f} now")
    for form in record["forms"]:
        marks = " and ".join(mark for mark in ("former", "chosen") if form[mark])
        line = f"{form['milliseconds']:9.2f} ms  {form['count']:9.0f} counted  {form['form']}"
        print(f"{line}  ({marks})" if marks else line)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="rounds (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="three rounds, an eighth of the batch")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="(%(default)s)")
    options = parser.parse_args()
    folder = options.out / "onnx_gram"
    if importlib.util.find_spec("tract_fx") is not None:
        write_models(folder)
    elif not (folder / "models.json").exists():
        parser.error(f"no models in {folder}: run this first where tract_fx is installed")
    repeats = 3 if options.quick else options.repeats
    print(f"Gram of a first layer in {build()}, {THREADS} threads, medians of {repeats}")
    records = []
    for entry in json.loads((folder / "models.json").read_text()):
        records.append(measure(entry, folder, repeats, quick=options.quick))
        print_layer(records[-1])
    file = options.out / "onnx_gram.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found[build()] = {"threads": THREADS, "quick": options.quick, "layers": records}
    file.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\nsaved {file}")


if __name__ == "__main__":
    main()
