"""Files and folders that are whole or not there: made beside their place, then renamed.

They are made as `new` in a folder `.NAME.tract-fx-….tmp`, on the place's own file system. A process
that is killed leaves that folder behind. The next one that writes to the same place removes it if
the writer is gone for sure: while it writes, a process holds a lock on a file in the folder, which
the system takes back however the process ends, and the folder's name has the boot of the system
that knows of the lock. On a shared file system another host's locks may not be seen, so that its
folders stay, as do those of an earlier boot. Nothing reads them, and they may be deleted by hand.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tract_fx.errors import ArtifactsWriteError, TractError

__all__ = ["OLD", "beside", "clear_left", "flush", "system_errors", "write_file"]

OLD, _NEW, _LOCK = "old", "new", "lock"
_LONGEST = 180  # of the place's name: a file's may have 255 bytes
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def beside(place: Path) -> Iterator[Path]:
    """Give the name under which the new content of a place is made.

    Args:
        place: Where the content goes. Its folder is there.

    Yields:
        A path with nothing at it, to be renamed to the place. What is there at the end is removed.
        Beside it what was at the place can be put, as `OLD`.
    """
    folder = place.parent / f"{_prefix(place)}{secrets.token_hex(6)}.tmp"
    folder.mkdir()
    lock = None
    try:
        lock, boot = _locked(folder / _LOCK, os.O_CREAT), _boot()
        if lock is not None and boot is not None:  # from now on others may judge by the lock
            held = folder.with_name(f"{_prefix(place)}{boot}-{secrets.token_hex(6)}.tmp")
            os.rename(folder, held)
            folder = held
        yield folder / _NEW
    finally:
        _remove(folder, lock)


def clear_left(place: Path, discard: Callable[[Path], None] = shutil.rmtree) -> None:
    """Remove what processes have left that were killed while they wrote to a place.

    Where one was killed between taking the old content away and putting the new in its place, the
    old is put back.

    Args:
        place: The place.
        discard: Removes old content that has been replaced.
    """
    boot = _boot()
    if boot is None:
        return
    left = re.compile(f"{re.escape(_prefix(place))}{boot}-[0-9a-f]+[.]tmp")
    with contextlib.suppress(OSError):
        for folder in [entry for entry in place.parent.iterdir() if left.fullmatch(entry.name)]:
            lock = _locked(folder / _LOCK)
            if lock is None:
                continue
            with contextlib.suppress(OSError):
                if not os.path.lexists(place):
                    os.rename(folder / OLD, place)
                else:
                    discard(folder / OLD)
            _remove(folder, lock)


def write_file(place: Path, data: bytes, check: Callable[[], None] = lambda: None) -> None:
    """Write a file, all of it or nothing. One that is replaced leaves its mode to the new one.

    Args:
        place: Where to. Folders that are missing are made.
        data: Its content.
        check: Called right before the file is put in its place; may raise.

    Raises:
        ArtifactsWriteError: The system refuses.
    """  # noqa: DOC502 (raised by what it calls)
    with system_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        clear_left(place)
        with beside(place) as new:
            new.write_bytes(data)
            flush(new)
            if place.is_file():
                shutil.copymode(place, new)
            check()
            os.replace(new, place)


def flush(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # folders can't be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def system_errors(place: Path) -> Iterator[None]:
    """Give the system's refusals the three parts of our errors."""
    try:
        if "\0" in str(place):
            raise OSError("no name has a null character")
        yield
    except TractError:
        raise
    except OSError as error:
        raise ArtifactsWriteError(
            str(place),
            f"it can't be written ({error.strerror or error}): the system refuses",
            "Check that the folder can be written and the disk has room, or choose another place",
        ) from error


def _prefix(place: Path) -> str:
    return f".{os.fsdecode(os.fsencode(place.name)[:_LONGEST])}.tract-fx-"


def _boot() -> str | None:
    """Name this boot of this system, None where the system does not."""
    try:
        return _BOOT.read_text().strip().replace("-", "")[:16] or None
    except OSError:
        return None


def _locked(file: Path, flags: int = 0) -> int | None:
    """Open and lock a file, None where another holds the lock or there are no locks."""
    try:
        import fcntl

        descriptor = os.open(file, os.O_RDWR | flags)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(folder: Path, lock: int | None) -> None:
    """Remove a folder of `beside`, unless somebody has put something of theirs in it."""
    shutil.rmtree(folder / _NEW, ignore_errors=True)
    for file in (_NEW, _LOCK):
        with contextlib.suppress(OSError):
            (folder / file).unlink()
    if lock is not None:
        os.close(lock)  # before the folder goes: on NFS an open file keeps a name in it
    with contextlib.suppress(OSError):
        folder.rmdir()
