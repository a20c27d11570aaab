"""Which objects the calls take as models, and what to give instead of the others."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from tract_fx.errors import UnsupportedModelError


def as_graph_module(gm: object) -> fx.GraphModule:
    """Check what was given as a graph."""
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
    """Refuse a model inside something that goes on calling the original, whatever a copy holds."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"a model of class {type(model).__name__}",
            "TorchScript keeps the forward pass alone",
            "Give the module that it was made from",
        )
    found = next(((name, *why) for name, m in model.named_modules() if (why := _wrapping(m))), None)
    if found is not None:
        name, reason, remedy = found
        inside = (
            f", in which {name} is a {type(model.get_submodule(name)).__name__}" if name else ""
        )
        raise UnsupportedModelError(
            f"a model of class {type(model).__name__}{inside}", reason, remedy
        )


def _wrapping(module: nn.Module) -> tuple[str, str] | None:
    """Say why what goes on calling the original can't be copied, and what to give instead."""
    classes = {t.__name__ for t in type(module).__mro__}
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return (
            "it holds on to the layers that it was made with",
            "Give the module inside it (.module), and wrap the result",
        )
    if classes & {"FSDPModule", "FullyShardedDataParallel"}:
        return (
            "its parameters are sharded by hooks that hold on to it",
            "Give the model as it was before fully_shard, and shard the result",
        )
    in_place = vars(module).get("_compiled_call_impl") is not None  # by module.compile()
    if in_place or isinstance(module, torch._dynamo.OptimizedModule):
        return (
            "it is compiled, and would go on running the layers it was made of",
            "Give the model as it was before torch.compile, and compile the result",
        )
    if "UnflattenedModule" in classes:
        return (
            "its layers are graphs of their own, which are called in turn",
            "Give the exported program itself to tract_pass",
        )
    if vars(module).get("_is_accelerate_prepared"):
        return (
            "Accelerate has prepared it, and goes on training and saving the model that it knows",
            "Apply TrAct first, then accelerator.prepare to the result",
        )
    return None
