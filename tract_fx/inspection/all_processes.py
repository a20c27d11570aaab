"""What the calls of all processes read, where their Gram is of all: by collectives of its own.

Nothing here uses the library's sums, which it is there to check. All processes have to inspect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from tract_fx.passes.records import InputLayer
from tract_fx.preconditioner.process_groups import WORLD, resolve
from tract_fx.reference.observed import AllRows, ObservedCall


def with_all_processes(call: ObservedCall) -> ObservedCall:
    """Add to a call what the other processes' calls read."""
    group = None if call.record.group is None else resolve(call.record.group)
    if group is None:
        return call
    n = call.columns
    own = [rows for rows, _ in call.chunks()]
    counts = torch.tensor([call.row_count], device=call.x.device)
    dist.all_reduce(counts, group=group)
    total = int(counts)
    rows = None
    if total < n:
        shape = (call.groups, 0, n)
        mine = torch.cat(own, dim=1) if own else call.x.new_zeros(shape, dtype=torch.float64)
        found: list[Tensor | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, mine.cpu(), group=group)
        rows = torch.cat([part for part in found if part is not None], dim=1).to(call.x.device)
        gram = rows.mT @ rows
    else:
        gram = torch.zeros((call.groups, n, n), dtype=torch.float64, device=call.x.device)
        for part in own:
            gram += part.mT @ part
        dist.all_reduce(gram, group=group)
    return replace(call, all_rows=AllRows(total, gram / max(1, total), rows))


def gram_notes(record: InputLayer, call: ObservedCall | None) -> Iterator[str]:
    """Say whose rows a call's Gram is of, where there are several processes."""
    if record.group is not None:
        name = record.group.partition(":")[0]
        which = "all processes" if record.group == WORLD else f"the process group {name!r}"
        if call is None or call.all_rows is None:
            yield f"its Gram is of the rows of {which} (gram='global')"
        else:
            yield (
                f"its Gram is of {call.all_rows.count:,} rows, those of {which} (gram='global'), "
                f"{call.row_count:,} of them of this process"
            )
    elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        size = dist.get_world_size()
        said = f"its Gram is of this one of {size} processes' own rows (gram='local')"
        if call is not None and 0 < call.row_count < call.columns:
            said += (
                f", {call.row_count:,}, fewer than its {call.columns:,} columns: each process "
                "leaves other directions untouched, and what they agree on is less than the large "
                "batch's. Consider gram='global'"
            )
        yield said
