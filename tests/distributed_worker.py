"""One of two processes: wraps a rewritten model for parallel training and saves its gradient.

python distributed_worker.py RANK FOLDER: the gradients of all arrangements go to FOLDER/RANK.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rewritten import CONV_ABOVE, LINEAR_BELOW, Case, loss, weight_of

WORLD = 2
FORMS = (CONV_ABOVE, LINEAR_BELOW)


def batch_of(case: Case, rank: int) -> Tensor:
    """Each process has images of its own."""
    return case.batch(seed=100 + rank)


def data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def compiled_data_parallel(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(DistributedDataParallel(model), backend="aot_eager")  # type: ignore[assignment]
    return wrapped


def data_parallel_of_compiled(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(model, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    return DistributedDataParallel(compiled)


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    return model


def sharded_layer_alone(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.get_submodule("first"), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": data_parallel,
    "compile of DDP": compiled_data_parallel,
    "DDP of compile": data_parallel_of_compiled,
    "FSDP2": sharded,
    "FSDP2, layer alone": sharded_layer_alone,
}
# A layer that is a node has no module to shard alone.
ARRANGEMENTS = [
    (wrapper, Case(form, way))
    for wrapper in WRAPPERS
    for form in FORMS
    for way in ("call_module", "exported_node", "tract_module")
    if not (wrapper.endswith("alone") and way == "exported_node")
]


def whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    found: dict[str, Tensor | str] = {}
    for wrapper, case in ARRANGEMENTS:
        torch._dynamo.reset()
        model = WRAPPERS[wrapper](case.rewrite(case.net()))
        loss(model(batch_of(case, rank))).backward()
        found[f"{wrapper}-{case}"] = whole(weight_of(model).grad)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
