"""What killed processes leave beside a place is removed by the next to write there, no other's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("fcntl", reason="needs POSIX")

from forked import run_script
from killed_writer import EMPTY
from tract_fx import atomic
from tract_fx.artifacts.directory import read_directory, write_directory
from tract_fx.atomic import beside, clear_left, write_file
from tract_fx.errors import ArtifactsExistError, ArtifactsWriteError

SCRIPT = Path(__file__).parent / "killed_writer.py"
pytestmark = pytest.mark.skipif(atomic._boot() is None, reason="needs the name of a system's boot")


def others(place: Path) -> list[Path]:
    return sorted(entry for entry in place.parent.iterdir() if entry != place)


def killed(place: Path, moment: str, *overwrite: str) -> Path:
    """What a process leaves that was killed."""
    before = others(place)
    ended = run_script(SCRIPT, str(place), moment, *overwrite)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (left,) = set(others(place)) - set(before)
    return left


def write(place: Path, content: str = "x", overwrite: bool = False) -> None:
    with write_directory(place, overwrite) as new:
        (new.path / "checkpoint").write_text(content)
        new.manifest = EMPTY


@contextmanager
def alive(place: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that is writing, and its folder."""
    before = others(place)
    command = [sys.executable, str(SCRIPT), str(place), "waiting", "overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (folder,) = set(others(place)) - set(before)
        yield process, folder
    finally:
        process.kill()
        process.communicate()


def test_the_next_to_write_there_clears_what_is_left(tmp_path: Path) -> None:
    place = tmp_path / "a"
    left = [killed(place, "writing", "overwrite") for _ in range(2)]
    assert len(others(place)) == 1 and left[1].is_dir()  # the second has cleared the first's
    write(place)
    assert others(place) == []
    read_directory(place)


def test_a_file_that_was_not_yet_there(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    left = killed(place, "file")
    assert (left / "new").read_bytes() == b"half" and not place.exists()
    write_file(place, b"whole")
    assert others(place) == [] and place.read_bytes() == b"whole"


def test_a_live_writers_folder_stays(tmp_path: Path) -> None:
    """Running or stopped; once it is killed its folder goes."""
    place = tmp_path / "a"
    with alive(place) as (process, folder):
        write(place, "one")
        process.send_signal(signal.SIGSTOP)
        write(place, "two", overwrite=True)
        assert others(place) == [folder]
        assert (folder / "new" / "training_model.onnx").read_bytes() == b"half"
        process.kill()
        process.wait()
        write(place, "three", overwrite=True)
        assert others(place) == []


def test_a_writer_in_another_thread_stays(tmp_path: Path) -> None:
    place = tmp_path / "a"
    with write_directory(place) as new:
        clear_left(place)
        assert new.path.is_dir()
        new.manifest = EMPTY
    assert others(place) == []


def test_folders_of_other_systems_and_other_places_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lock is held on them here, where another host's are not seen."""
    boot = atomic._boot()
    place, similar = tmp_path / "a", tmp_path / "a.tract-fx-b"
    left = [killed(similar, "writing").rename(tmp_path / "kept"), killed(place, "writing")]
    left[0] = left[0].rename(tmp_path / f".a.tract-fx-b.tract-fx-{boot}-0123456789ab.tmp")
    stays = {
        left[0],
        tmp_path / f".a.tract-fx-{'0' * 16}-0123456789ab.tmp",  # another boot
        tmp_path / ".a.tract-fx-0123456789ab.tmp",  # of one who could not lock
        tmp_path / f".b.tract-fx-{boot}-0123456789ab.tmp",
        tmp_path / f".a.tract-fx-{boot}-0123456789ab.tmp.kept",
    }
    for folder in stays - {left[0]}:
        shutil.copytree(left[1], folder)
    without_lock = tmp_path / f".a.tract-fx-{boot}-ba9876543210.tmp"
    shutil.copytree(left[1], without_lock)
    (without_lock / "lock").unlink()
    write(place)
    assert set(others(place)) == {*stays, without_lock}
    assert all((folder / "new").is_dir() for folder in others(place))

    monkeypatch.setattr(atomic, "_BOOT", tmp_path / "none")  # a system that does not say
    write(place, overwrite=True)
    assert set(others(place)) == {*stays, without_lock}


def test_without_locks_nothing_is_said_of_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", none)
        held = beside(tmp_path / "a")
        new = held.__enter__()
    assert f"-{atomic._boot()}-" not in new.parent.name
    assert new.parent.name.startswith(".a.tract-fx-")
    new.write_text("mine")
    write_file(tmp_path / "a", b"x")
    assert new.read_text() == "mine"
    held.__exit__(None, None, None)
    assert others(tmp_path / "a") == []


def test_killed_in_the_middle_of_a_swap(tmp_path: Path) -> None:
    """The only copy of what was there is put back, and then is the user's to replace."""
    place = tmp_path / "a"
    write(place, "old")
    left = killed(place, "swapping", "overwrite")
    assert not place.exists() and {entry.name for entry in left.iterdir()} == {"lock", "new", "old"}
    with pytest.raises(ArtifactsExistError):
        write(place, "new")
    assert others(place) == [] and (place / "checkpoint").read_text() == "old"
    read_directory(place)

    killed(place, "swapping", "overwrite")
    write(place, "new", overwrite=True)
    assert others(place) == [] and (place / "checkpoint").read_text() == "new"


def test_what_a_swap_had_replaced_is_removed(tmp_path: Path) -> None:
    """Killed behind the swap: the old artifacts go, what somebody has put there stays."""
    place = tmp_path / "a"
    write(place, "old")
    left = killed(place, "swapping", "overwrite")
    os.rename(left / "new", place)
    (left / "old" / "theirs").write_text("theirs")
    write(place, "newer", overwrite=True)
    assert [path.relative_to(left) for path in left.rglob("*")] == [
        Path("old"),
        Path("old", "theirs"),
    ]
    read_directory(place)


def test_a_name_of_full_length(tmp_path: Path) -> None:
    place = tmp_path / ("ä" * 127)
    killed(place, "writing")
    write(place)
    assert others(place) == []
    with pytest.raises(ArtifactsWriteError, match=r"null character.*another place"):
        write_file(tmp_path / "a\0b", b"")
