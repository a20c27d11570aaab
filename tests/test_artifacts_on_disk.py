"""A directory of artifacts is complete or absent, and a damaged one is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime.training.api", reason="needs ONNX Runtime Training")

from forked import run_script
from ort_artifacts import ConvNet, Mlp, batches, build, replace_file
from tract_fx.artifacts import directory
from tract_fx.artifacts.directory import NewDirectory, read_directory, write_directory
from tract_fx.artifacts.manifest import (
    FORMAT_VERSION,
    FileRecord,
    Manifest,
    ParameterSpec,
    TensorSpec,
    TractLayer,
)
from tract_fx.artifacts.optimizers import SGD, AdamW
from tract_fx.errors import (
    ArtifactsExistError,
    ArtifactsWriteError,
    DamagedArtifactsError,
)
from tract_fx.trainers import load_trainer

TESTS = Path(__file__).parent
FILES = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint")

FULL = Manifest(
    target="ort-training",
    versions={"onnxruntime": "1.19.2"},
    layers=(
        TractLayer("stem", "n", "conv2d", ("w", "g"), (4, 3, 2, 2), {"kernel": [2, 2]}, 0.05),
        TractLayer("λ", "m", "linear", ("v",), None, None, 1e-300),
    ),
    loss="cross_entropy",
    optimizer=AdamW(lr=0.1 + 0.2, betas=(0.8, 0.99), max_grad_norm=1.0, accumulate=3),
    inputs=(TensorSpec("x", "float32", ("batch", None, 3)), TensorSpec("k", "int64", ())),
    targets=(TensorSpec("y", "int64", ("batch",), 10, -100),),
    outputs=("logits", "more"),
    parameters=(ParameterSpec("w", (4, 3, 2, 2), "float32", True),),
    counters={"norm.num_batches_tracked": 7},
    aliases={"a": "w"},
    updates=2,
    batches=6,
    seed=2**63,
    learning_rate=1e-5,
    files={"checkpoint": FileRecord("00", 3)},
)
PLAIN = dataclasses.replace(FULL, layers=(), optimizer=SGD(), learning_rate=None, files={})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    build(folder / "mlp", Mlp(), SGD(lr=0.1))
    build(folder / "conv", ConvNet(), AdamW())
    return folder


@pytest.fixture
def artifacts(made: Path, tmp_path: Path) -> Path:
    """A copy to damage, alone in its folder."""
    return Path(shutil.copytree(made / "mlp", tmp_path / "here" / "mlp"))


def write(place: Path, content: str = "x", **options: Any) -> None:
    with write_directory(place, **options) as new:
        (new.path / "checkpoint").write_text(content)
        new.manifest = PLAIN


def beside(place: Path) -> list[str]:
    return sorted(entry.name for entry in place.parent.iterdir() if entry != place)


# --- the manifest -------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", [FULL, PLAIN], ids=["full", "plain"])
def test_manifest_there_and_back(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


def altered(change: Callable[[dict[str, Any]], object]) -> str:
    """A manifest whose checksum is right and whose entries are not."""
    entries = json.loads(FULL.to_json())
    del entries["checksum"]
    change(entries)
    from tract_fx.artifacts import manifest

    return json.dumps(entries | {"checksum": manifest._checksum(entries)})


BAD_ENTRIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "manifest has no 'seed'": lambda m: m.pop("seed"),
    "unknown entries: more": lambda m: m.update(more=1),
    "manifest.updates is '2'": lambda m: m.update(updates="2"),
    "manifest.updates is True": lambda m: m.update(updates=True),
    "manifest.updates is 2.0": lambda m: m.update(updates=2.0),
    "manifest.layers[0] is no TractLayer": lambda m: m["layers"][0].update(type="TensorSpec"),
    "manifest.layers is no list": lambda m: m.update(layers={}),
    "manifest.files is no mapping": lambda m: m.update(files=[]),
    "manifest.inputs[0].shape[2] is 3.5": lambda m: m["inputs"][0]["shape"].__setitem__(2, 3.5),
    "betas has 1 entries in place of 2": lambda m: m["optimizer"].update(betas=[0.9]),
    "AdamW(lr=-1.0)": lambda m: m["optimizer"].update(lr=-1),
}


@pytest.mark.parametrize("message", BAD_ENTRIES)
def test_manifests_of_another_form(message: str) -> None:
    with pytest.raises(DamagedArtifactsError) as caught:
        Manifest.from_json(altered(BAD_ENTRIES[message]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        (FULL.to_json()[:-20], "not JSON"),
        ("[]", "not a manifest"),
        ("{}", "not a manifest"),
        ('{"format_version": "1"}', "not a manifest"),
        ('{"format_version": 1}', "altered"),
        (f'{{"format_version": {FORMAT_VERSION + 1}}}', "Install a later tract_fx"),
        (FULL.to_json().replace("0.05", "0.06"), "altered"),
        (FULL.to_json().replace('"seed": 9', '"seed": 8'), "altered"),
    ],
)
def test_texts_that_are_no_manifest(text: str, message: str) -> None:
    with pytest.raises(DamagedArtifactsError, match=message):
        Manifest.from_json(text)


def test_a_manifests_spacing_does_not_matter() -> None:
    assert Manifest.from_json(json.dumps(json.loads(FULL.to_json()))) == FULL


# --- reading ------------------------------------------------------------------------------------


def test_complete(artifacts: Path) -> None:
    assert set(read_directory(artifacts).files) == set(FILES)
    assert {file.name for file in artifacts.iterdir()} == {*FILES, "manifest.json"}


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "altered", "foreign"])
def test_damaged_files(artifacts: Path, made: Path, name: str, damage: str) -> None:
    """Both for a new trainer and for one at work, which stays as it was."""
    trainer = load_trainer(made / "mlp")
    trainer.train_step(*batches(Mlp(), 1)[0])
    before = trainer.state_dict()
    file = artifacts / name
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:middle])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "altered":
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        shutil.copy(made / "conv" / name, file)
        if name == "manifest.json":  # right by itself: the files are then not its files
            name = "checkpoint"
    for call in (load_trainer, trainer.load):
        with pytest.raises(DamagedArtifactsError) as caught:
            call(artifacts)
        assert name in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in trainer.state_dict().items())


def test_checkpoint_of_another_model(artifacts: Path, made: Path) -> None:
    """The checksums are right; what is in it is not what the manifest says."""
    other = (made / "conv" / "checkpoint").read_bytes()
    replace_file(artifacts, read_directory(artifacts), "checkpoint", other)
    with pytest.raises(DamagedArtifactsError, match="the checkpoint is another model's"):
        load_trainer(artifacts)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"inputs": (TensorSpec("z", "float32", ("batch", 8)),)}, "takes x, labels"),
        ({"outputs": ("other",)}, "the manifest says a loss and other"),
        ({"target": "tensorrt"}, "artifacts for 'tensorrt'"),
        (
            {"parameters": (ParameterSpec("first.weight", (16, 9), "float32", True),)},
            "'first.bias' is float32",
        ),
    ],
)
def test_manifests_of_another_model(artifacts: Path, entries: dict[str, Any], message: str) -> None:
    manifest = dataclasses.replace(read_directory(artifacts), **entries)
    (artifacts / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    with pytest.raises(DamagedArtifactsError, match=message):
        load_trainer(artifacts)


@pytest.mark.parametrize("shape", [(16, 9), (8, 16)])
def test_parameters_of_another_shape(artifacts: Path, shape: tuple[int, int]) -> None:
    manifest = read_directory(artifacts)
    first, *rest = manifest.parameters
    specs = (dataclasses.replace(first, shape=shape), *rest)
    manifest = dataclasses.replace(manifest, parameters=specs)
    (artifacts / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    with pytest.raises(DamagedArtifactsError, match="float32"):
        load_trainer(artifacts)


@pytest.mark.parametrize("content", [b"", b"\x08\x0a", b"nonsense" * 100])
@pytest.mark.parametrize("name", FILES)
def test_files_that_onnx_runtime_does_not_read(artifacts: Path, name: str, content: bytes) -> None:
    """Recorded in the manifest as they are, so that only loading shows it."""
    replace_file(artifacts, read_directory(artifacts), name, content)
    with pytest.raises(DamagedArtifactsError):
        load_trainer(artifacts)


def test_places_that_hold_no_artifacts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("nowhere", "there is no such directory"),
        ("file", "it is not a directory"),
        ("folder", "not a directory of training artifacts"),
    ):
        with pytest.raises(DamagedArtifactsError, match=message):
            load_trainer(tmp_path / name)


@pytest.mark.parametrize("name", ["../checkpoint", "a/b", "", "..", "manifest.json"])
def test_files_outside_the_directory(tmp_path: Path, name: str) -> None:
    manifest = dataclasses.replace(PLAIN, files={name: FileRecord("", 0)})
    (tmp_path / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    with pytest.raises(DamagedArtifactsError, match="artifacts lie in the directory itself"):
        read_directory(tmp_path)


# --- writing ------------------------------------------------------------------------------------


def test_written_whole(tmp_path: Path) -> None:
    place = tmp_path / "parents" / "too" / "a"
    write(place)
    (record,) = read_directory(place).files.values()
    assert record.bytes == 1
    (tmp_path / "plain").mkdir()
    assert place.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not a private folder
    assert not beside(place)


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    place = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt), write_directory(place) as new:
        (new.path / "checkpoint").write_text("half")
        assert not place.exists()
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="no manifest"), write_directory(place):
        pass
    assert not list(tmp_path.iterdir())
    write(place, "old")
    with pytest.raises(KeyboardInterrupt), write_directory(place, overwrite=True):
        raise KeyboardInterrupt
    assert (place / "checkpoint").read_text() == "old"
    assert not beside(place)


def test_overwriting(tmp_path: Path) -> None:
    place = tmp_path / "a"
    write(place, "old")
    entered = False
    with pytest.raises(ArtifactsExistError, match="pass overwrite=True"), write_directory(place):
        entered = True
    assert not entered  # refused before the work, not after it
    write(place, "new", overwrite=True)
    assert (place / "checkpoint").read_text() == "new"
    read_directory(place)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")  # nothing is lost
    read_directory(tmp_path / "empty")
    with pytest.raises(FileExistsError):
        write(tmp_path / "empty")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "empty"]


def test_damaged_artifacts_can_be_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    (tmp_path / "a" / "checkpoint").write_text("altered")
    write(tmp_path / "a", "new", overwrite=True)
    assert (tmp_path / "a" / "checkpoint").read_text() == "new"


def test_other_peoples_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("words")
    write(tmp_path / "notes")
    (tmp_path / "notes" / "notes.txt").write_text("words")
    write(tmp_path / "sub")
    (tmp_path / "sub" / "folder").mkdir()
    (tmp_path / "file").write_text("words")
    for name in ("work", "notes", "sub", "file"):
        before = sorted((tmp_path / name).rglob("*"))
        for overwrite in (False, True):
            with pytest.raises(ArtifactsExistError):
                write(tmp_path / name, overwrite=overwrite)
        assert sorted((tmp_path / name).rglob("*")) == before
    assert (tmp_path / "file").read_text() == "words"
    assert len(list(tmp_path.iterdir())) == 4


def test_what_comes_in_the_meantime_stays(tmp_path: Path) -> None:
    place = tmp_path / "a"
    for overwrite in (False, True):
        with pytest.raises(ArtifactsExistError), write_directory(place, overwrite) as new:
            new.manifest = PLAIN
            place.mkdir(exist_ok=True)
            (place / "thesis.tex").write_text("words")
        assert (place / "thesis.tex").read_text() == "words"
        assert not beside(place)
        shutil.rmtree(place)


def test_a_rival_between_check_and_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, check, calls = tmp_path / "a", directory._refuse_to_replace, []

    def late(where: Path, overwrite: bool) -> None:
        check(where, overwrite)
        calls.append(where)
        if len(calls) == 2:
            place.mkdir()
            (place / "thesis.tex").write_text("words")

    monkeypatch.setattr(directory, "_refuse_to_replace", late)
    with pytest.raises(ArtifactsExistError):
        write(place)
    assert (place / "thesis.tex").read_text() == "words"
    assert not beside(place)


def test_links(tmp_path: Path) -> None:
    """What a link points to is written or replaced, the link stays."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real", target_is_directory=True)
    write(link, "old")
    write(link, "new", overwrite=True)
    assert link.is_symlink()
    assert (tmp_path / "real" / "checkpoint").read_text() == "new"


def test_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactsWriteError, match="the system refuses"):
        write(tmp_path / "file" / "a")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ArtifactsWriteError, match="the system refuses"):
            write(tmp_path / "locked" / "a")
    write(tmp_path / "a", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name, overwrite in (("b", False), ("a", True)):
        with pytest.raises(ArtifactsWriteError, match="No space left on device"):
            write(tmp_path / name, "new", overwrite=overwrite)
    assert (tmp_path / "a" / "checkpoint").read_text() == "old"
    assert not [name for name in beside(tmp_path / "a") if name not in ("file", "locked")]


def test_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there is put back when the new folder can't be."""
    place = tmp_path / "a"
    write(place, "old")
    rename = os.rename

    def refuse(source: Path, goal: Path) -> None:
        if goal == place and (Path(source) / "checkpoint").read_text() == "new":
            raise OSError(5, "Input/output error")
        rename(source, goal)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(ArtifactsWriteError, match="Input/output error"):
        write(place, "new", overwrite=True)
    assert (place / "checkpoint").read_text() == "old"
    read_directory(place)
    assert not beside(place)


@pytest.mark.parametrize("overwrite", ["new", "overwrite"])
def test_killed_while_writing(tmp_path: Path, overwrite: str) -> None:
    place = tmp_path / "a"
    if overwrite == "overwrite":
        write(place, "old")
    ended = run_script(TESTS / "killed_writer.py", str(place), "writing", overwrite)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (left,) = beside(place)
    assert left.startswith(".a.tract-fx-")
    assert left.endswith(".tmp")
    if overwrite == "overwrite":
        assert (place / "checkpoint").read_text() == "old"
    else:
        assert not place.exists()
    with pytest.raises(DamagedArtifactsError):
        read_directory(tmp_path / left)
    write(place, "new", overwrite=True)
    read_directory(place)


@pytest.mark.parametrize("overwrite", [False, True])
def test_writers_at_the_same_time(tmp_path: Path, overwrite: bool) -> None:
    """One of them wins, whole; without `overwrite` the others are told."""
    place = tmp_path / "a"
    start = threading.Barrier(6, timeout=60)
    results: list[str] = []

    def work(content: str) -> None:
        with write_directory(place, overwrite) as new:
            (new.path / "checkpoint").write_text(content)
            new.manifest = PLAIN
            start.wait()
        results.append(content)

    def attempt(number: int) -> None:
        try:
            work(str(number) * 1000)
        except ArtifactsExistError:
            results.append("refused")

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [result for result in results if result != "refused"]
    assert len(results) == 6
    assert len(won) == (6 if overwrite else 1)
    read_directory(place)
    assert (place / "checkpoint").read_text() in won
    assert not beside(place)


def test_set_manifest_names_the_files(tmp_path: Path) -> None:
    with write_directory(tmp_path / "a") as new:
        assert isinstance(new, NewDirectory)
        (new.path / "checkpoint").write_text("x")
        new.manifest = PLAIN
    assert new.manifest == read_directory(tmp_path / "a")


@pytest.mark.parametrize("kind", [ArtifactsExistError, ArtifactsWriteError])
def test_errors_of_two_parents(kind: type[ArtifactsExistError | ArtifactsWriteError]) -> None:
    error = kind("place", "reason", "Do this")
    assert str(error) == "place: reason. Do this."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
