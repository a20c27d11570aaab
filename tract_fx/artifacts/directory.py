"""A directory of training artifacts: complete or absent, and checked when it is read.

It is written beside its place and renamed (`tract_fx.atomic`, which also says what a process that
is killed leaves behind).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from tract_fx.artifacts.manifest import MANIFEST_FILE, FileRecord, Manifest
from tract_fx.atomic import OLD, beside, clear_left, flush, system_errors
from tract_fx.errors import ArtifactsExistError, DamagedArtifactsError

TRAINING_MODEL = "training_model.onnx"
EVAL_MODEL = "eval_model.onnx"
OPTIMIZER_MODEL = "optimizer_model.onnx"
CHECKPOINT = "checkpoint"
MODEL_TENSORS = "model.safetensors"
OPTIMIZER_TENSORS = "optimizer.safetensors"
CONSTANTS = "constants.pt"
"""Tensors of the state_dict that training leaves alone: constant buffers, unused parameters. Absent
where there are none."""

_BLOCK = 1 << 20


class NewDirectory:
    """A directory that is being written.

    Attributes:
        path: The temporary folder to write files in. It holds files only, no folders.
        manifest: The manifest, to be set before the end; then its `files` are filled in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest | None = None


@contextlib.contextmanager
def write_directory(
    directory: str | os.PathLike[str], overwrite: bool = False
) -> Iterator[NewDirectory]:
    """Write a directory of artifacts, all of it or nothing."""
    place = Path(directory).resolve()
    with contextlib.ExitStack() as stack:
        with system_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            clear_left(place, _remove_artifacts)
            with _one_writer(place.parent):
                _refuse_to_replace(place, overwrite)
            new = NewDirectory(stack.enter_context(beside(place)))
            new.path.mkdir()
        yield new
        if new.manifest is None:
            raise ValueError("no manifest was set")
        with system_errors(place):
            new.manifest = _seal(new.path, new.manifest)
            _put_in_place(new.path, place, overwrite)


def read_directory(directory: str | os.PathLike[str]) -> Manifest:
    """Check a directory of artifacts, file by file, and read its manifest."""
    place = Path(directory)
    manifest = _read_manifest(place)
    for name, record in manifest.files.items():
        file = place / name
        try:
            size = file.stat().st_size
            checksum = _sha256(file) if size == record.bytes else ""
        except OSError as error:
            raise DamagedArtifactsError(
                str(file),
                f"the manifest names this file, and it can't be read ({error.strerror})",
                _REMEDY,
            ) from error
        if size != record.bytes:
            raise DamagedArtifactsError(
                str(file), f"it has {size} bytes where the manifest says {record.bytes}", _REMEDY
            )
        if checksum != record.sha256:
            raise DamagedArtifactsError(
                str(file), "its checksum is not the manifest's: it was altered or replaced", _REMEDY
            )
    return manifest


_REMEDY = "Take the whole directory again from where it was written, or export the model again"


def _read_manifest(place: Path) -> Manifest:
    """Read the manifest, or say what there is in its place."""
    try:
        text = (place / MANIFEST_FILE).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        if not place.exists():
            reason, remedy = "there is no such directory", "Check the path"
        elif not place.is_dir():
            reason, remedy = "it is not a directory", "Pass the directory that holds the artifacts"
        else:
            reason = f"its {MANIFEST_FILE} can't be read ({error}), so that it is incomplete or "
            reason, remedy = reason + "not a directory of training artifacts", _REMEDY
        raise DamagedArtifactsError(str(place), reason, remedy) from error
    try:
        manifest = Manifest.from_json(text)
    except DamagedArtifactsError as error:
        raise DamagedArtifactsError(
            f"{place}: {error.found}", error.reason, error.remedy
        ) from error
    no_names = {"", ".", "..", MANIFEST_FILE}
    odd = [name for name in manifest.files if name in no_names or Path(name).name != name]
    if odd:
        raise DamagedArtifactsError(
            f"{place / MANIFEST_FILE} names the file {odd[0]!r}",
            "artifacts lie in the directory itself",
            _REMEDY,
        )
    return manifest


def _refuse_to_replace(place: Path, overwrite: bool) -> None:
    """Refuse a place where something is that may not be replaced."""
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise ArtifactsExistError(str(place), "a file is in the way", "Choose another directory")
    entries = {entry.name for entry in place.iterdir()}
    if not entries:
        return
    if not overwrite:
        raise ArtifactsExistError(
            str(place),
            "it exists, and is not overwritten without being asked",
            "Choose another directory, or pass overwrite=True",
        )
    try:
        own = {MANIFEST_FILE, *_read_manifest(place).files}
    except DamagedArtifactsError as error:
        raise ArtifactsExistError(
            str(place),
            f"it holds something else than artifacts of tract_fx ({error.reason})",
            "Choose another directory, or delete this one yourself",
        ) from error
    if entries - own:
        raise ArtifactsExistError(
            str(place),
            f"it holds other files beside artifacts: {', '.join(sorted(entries - own)[:5])}",
            "Choose another directory, or move those files away",
        )


def _seal(folder: Path, manifest: Manifest) -> Manifest:
    """Flush the files to the disk and write the manifest, the last one, with their records."""
    files = {file.name: file for file in sorted(folder.iterdir())}
    records = {n: FileRecord(_sha256(f), f.stat().st_size) for n, f in files.items()}
    manifest = dataclasses.replace(manifest, files=records)
    for file in files.values():
        flush(file)
    (folder / MANIFEST_FILE).write_bytes(manifest.to_json().encode())
    flush(folder / MANIFEST_FILE)
    flush(folder)
    return manifest


def _put_in_place(new: Path, place: Path, overwrite: bool) -> None:
    """Rename the folder to its place, and take away what was there."""
    with _one_writer(place.parent):
        _refuse_to_replace(place, overwrite)  # again: it may have come in the meantime
        old = _move_aside(place, new.with_name(OLD)) if overwrite else None
        try:
            os.rename(new, place)
        except OSError:
            if old is not None and not os.path.lexists(place):
                os.rename(old, place)
            elif os.path.lexists(place):  # somebody else's, who knows no lock
                _refuse_to_replace(place, overwrite=False)
            raise
        flush(place.parent)
    if old is not None:
        _remove_artifacts(old)


@contextlib.contextmanager
def _one_writer(parent: Path) -> Iterator[None]:
    """Keep other writers of ours, threads and processes, from checking or swapping meanwhile.

    Where the system or the file system has no such locks, two writers at the same instant may see
    each other's swap, and one of them gets an error.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _move_aside(place: Path, old: Path) -> Path | None:
    """Give what is in the place another name."""
    try:
        os.rename(place, old)
    except FileNotFoundError:
        return None
    return old


def _remove_artifacts(folder: Path) -> None:
    """Remove a folder of artifacts, and nothing that somebody else has put in it."""
    with contextlib.suppress(DamagedArtifactsError):
        for name in (*_read_manifest(folder).files, MANIFEST_FILE):
            with contextlib.suppress(OSError):
                (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _sha256(file: Path) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
