"""Process groups by name, and how processes make sure that they share one Gram.

Graphs, pickles and operators hold strings. A group is named by PyTorch's name for it and the ranks
that it is of, so that a name that means another group elsewhere is no group there. `WORLD` stands
for a group of TrAct's own, of all processes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from tract_fx import torch_private
from tract_fx.errors import InvalidGramError, ProcessGroupError

WORLD = "world"
"""Names the group of all processes that is made for TrAct alone, by the first backward pass."""

TIME_LIMIT = timedelta(minutes=5)
"""How long a process waits for the others at a layer's first backward pass."""

GroupChoice = Any
"""What `process_group=` takes: a ProcessGroup, a DeviceMesh of one dimension, or None."""

_REMEDY = (
    "All processes of the group have to apply TrAct alike, and to run the layer's backward pass "
    "equally often: no uneven numbers of batches (DistributedDataParallel.join), no backward pass "
    "of one process alone"
)

_lock = threading.Lock()
_own_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_agreed: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


@dataclass(frozen=True)
class GramScope:
    """Whose rows a layer's Gram is of, as one string in operators' arguments.

    Attributes:
        group: Name of the process group whose rows are added up; empty for this process's own.
        layer: The layer's name, by which processes know that they are at the same one.
        step: Names what adds up rows of several calls (`tract_step`, `tract_steps`); empty for a
            Gram of each call.
    """

    group: str
    layer: str
    step: str = ""

    def __str__(self) -> str:
        step = f"|{self.step}" if self.step else ""
        return f"{self.group}|{self.layer.replace('|', '/')}{step}"

    @classmethod
    def read(cls, text: str) -> GramScope:
        """Read what `str` has written.

        Args:
            text: The string.

        Returns:
            The scope.
        """
        return cls(*text.split("|"))


def group_of(scope: str | None) -> str | None:
    """Give the name of the process group in a scope.

    Args:
        scope: What a layer or node holds.

    Returns:
        The name, None for a Gram of the call's own rows.
    """
    return None if scope is None else GramScope.read(scope).group or None


def group_name(gram: object, process_group: GroupChoice) -> str | None:
    """Name the process group that a user means.

    Args:
        gram: `"local"` or `"global"`.
        process_group: A group or a mesh, or None for all processes.

    Returns:
        The name, None for a local Gram.

    Raises:
        InvalidGramError: `gram` is something else, or there is no such group.
    """
    if gram not in ("local", "global"):
        raise InvalidGramError(
            f"gram={gram!r}",
            "the Gram is of this process's rows or of those of a group of processes",
            "Give gram='local' (the default) or gram='global'",
        )
    if gram == "local":
        if process_group is not None:
            raise InvalidGramError(
                "process_group with gram='local'",
                "a local Gram is of this process's rows alone",
                "Give gram='global' too, or leave process_group out",
            )
        return None
    if process_group is None:
        return WORLD
    if getattr(process_group, "mesh_dim_names", None) is not None or hasattr(process_group, "mesh"):
        if process_group.ndim != 1:
            raise InvalidGramError(
                f"process_group={process_group!r}",
                "a mesh of several dimensions has no one group",
                "Give the dimension over which the batch is split, for example mesh['dp']",
            )
        process_group = process_group.get_group()
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise InvalidGramError(
            f"process_group={process_group!r}",
            "it is no process group that this process is a member of",
            "Give what torch.distributed.new_group has returned to a member, a DeviceMesh of one "
            "dimension, or None for all processes",
        )
    return f"{process_group.group_name}:{_ranks(dist.get_process_group_ranks(process_group))}"


def _ranks(ranks: Sequence[int]) -> str:
    """Write ranks short: 0-3,8-11."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ",".join("-".join(map(str, run)) for run in runs)


def resolve(name: str) -> Any:
    """Find the group of that name; make TrAct's own where it is meant, which all processes do.

    Args:
        name: What `group_name` has returned, here or in another process; empty for this process.

    Returns:
        The group, None where there is this one process alone.

    Raises:
        ProcessGroupError: There is no such group here.
    """
    if not name:
        return None
    running = dist.is_available() and dist.is_initialized()
    if name == WORLD:
        if not running or dist.get_world_size() == 1:
            return None
        default = dist.group.WORLD
        with _lock:
            if default not in _own_groups:
                _own_groups[default] = dist.new_group(group_desc="tract_fx")
            return _own_groups[default]
    wanted, _, ranks = name.partition(":")
    group = torch_private.find_group(wanted) if running else None
    if group is None or _ranks(dist.get_process_group_ranks(group)) != ranks:
        raise ProcessGroupError(
            f"TrAct's Gram over the process group {wanted!r} of ranks {ranks}",
            "there is no such group in this process",
            "Apply tract_pass or tract_module again with gram='global' and process_group= as it is "
            "here; process_group=None holds in any job",
        )
    return None if dist.get_world_size(group) == 1 else group


def agree(group: Any, layer: str, settings: str, rows: int) -> int:
    """Make sure, once for a layer, that all processes of a group are at the same one.

    Args:
        group: The group.
        layer: The layer's name.
        settings: All that has to be the same, for people to read.
        rows: Rows of this process's batch.

    Returns:
        Rows of all processes' batches at that first time, the same number in all processes.

    Raises:
        ProcessGroupError: They are not, or one has not come within the time limit.
    """
    own = f"{layer}, {settings}"
    agreed = _agreed.setdefault(group, {})
    if own not in agreed:
        agreed[own] = _exchange(group, layer, own, rows)
    return agreed[own]


def _exchange(group: Any, layer: str, own: str, rows: int) -> int:
    store, members = torch_private.group_store(group), dist.get_process_group_ranks(group)
    # The n-th to arrive is of the n // size-th exchange: nobody leaves one before all have come.
    number = (store.add("tract_fx/arrivals", 1) - 1) // len(members)
    keys = [f"tract_fx/{number}/{rank}" for rank in members]
    store.set(keys[dist.get_rank(group)], json.dumps([own, rows]))
    try:
        store.wait(keys, TIME_LIMIT)
    except RuntimeError:  # DistStoreError among them
        missing = [rank for rank, key in zip(members, keys, strict=True) if not store.check([key])]
        raise ProcessGroupError(
            f"process {dist.get_rank()} at TrAct's Gram of the layer {layer!r}",
            f"within {TIME_LIMIT.total_seconds():g} s these processes have not come to it: "
            f"{missing}",
            _REMEDY,
        ) from None
    found = [json.loads(store.get(key)) for key in keys]
    if any(theirs != own for theirs, _ in found):
        lines = "".join(
            f"\n  process {rank}: {theirs}"
            for rank, (theirs, _) in zip(members, found, strict=True)
        )
        raise ProcessGroupError(
            f"processes that share TrAct's Gram are not at the same layer:{lines}\n",
            "the Gram of all is one matrix, with one λ",
            _REMEDY,
        )
    return sum(int(count) for _, count in found)


def refuse_uneven_join(scope: str) -> None:
    """Refuse DDP's way of going on without processes that have no more batches.

    Args:
        scope: The layer's.

    Raises:
        ProcessGroupError: It is on, and the Gram is of several processes.
    """
    read = GramScope.read(scope)
    if read.group and torch_private.in_uneven_join():
        raise ProcessGroupError(
            f"DistributedDataParallel.join() over TrAct's Gram of the layer {read.layer!r}",
            "the processes that go on would wait for the rows of those that have ended",
            "Give all processes the same number of batches (an empty one will do), use "
            "join(throw_on_early_termination=True), which ends all with the first, or apply TrAct "
            "with gram='local'",
        )


def waited(work: Any, layer: str) -> None:
    """Wait for a collective, on the device's own queue where it has one.

    Args:
        work: What the collective has returned.
        layer: The layer's name.

    Raises:
        ProcessGroupError: Not all processes have come to it.
    """
    try:
        work.wait()
    except RuntimeError as error:
        raise ProcessGroupError(
            f"TrAct's Gram of the layer {layer!r} over several processes ({error})",
            "not all of them have come to it in time",
            _REMEDY,
        ) from error
