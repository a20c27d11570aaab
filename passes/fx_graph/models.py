"""Which objects the calls take as models, and what to give instead of the others."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from tract_fx.errors import UnsupportedModelError

__all__ = ["as_graph_module", "refuse_wrapped"]


def as_graph_module(gm: object) -> fx.GraphModule:
    """Check what was given as a graph.

    Args:
        gm: A GraphModule, or an ExportedProgram, whose module is taken.

    Returns:
        The GraphModule.

    Raises:
        UnsupportedModelError: `gm` is something else, or compiled already.
    """
    if isinstance(gm, ExportedProgram):
        module = gm.module()
        assert isinstance(module, fx.GraphModule)
        return module
    if isinstance(gm, nn.Module):
        refuse_wrapped(gm)
    if isinstance(gm, fx.GraphModule):
        return gm
    if isinstance(gm, nn.Module):
        remedy = (
            "Trace it first: tract_pass(torch.fx.symbolic_trace(model)). Where fx can't trace it, "
            "use torch.export.export(model, inputs) or tract_fx.tract_module(model, inputs)"
        )
    else:
        remedy = "Give a torch.fx.GraphModule or an ExportedProgram"
    raise UnsupportedModelError(
        f"a model of class {type(gm).__name__}", "the pass works on a graph", remedy
    )


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model inside something that goes on calling the original, whatever a copy holds.

    Args:
        model: Any module.

    Raises:
        UnsupportedModelError: It is scripted, compiled or wrapped for parallel training.
    """
    compiled = next((name for name, m in model.named_modules() if _is_compiled(m)), None)
    if isinstance(model, torch.jit.ScriptModule):
        reason = "TorchScript keeps the forward pass alone"
        remedy = "Give the module that it was made from"
    elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        reason = "it holds on to the layers that it was made with"
        remedy = "Give the module inside it (.module), and wrap the result"
    elif any(t.__name__ == "FSDPModule" for m in model.modules() for t in type(m).__mro__):
        reason = "its parameters are sharded by hooks that hold on to it"
        remedy = "Give the model as it was before fully_shard, and shard the result"
    elif compiled is not None:
        reason = (
            f"{compiled or 'it'} is compiled, and would go on running the layers it was made of"
        )
        remedy = "Give the model as it was before torch.compile, and compile the result"
    else:
        return
    raise UnsupportedModelError(f"a model of class {type(model).__name__}", reason, remedy)


def _is_compiled(module: nn.Module) -> bool:
    """Tell `torch.compile(module)` and `module.compile()`."""
    in_place = vars(module).get("_compiled_call_impl") is not None
    return in_place or isinstance(module, torch._dynamo.OptimizedModule)
