"""TrAct as a callback of Lightning's Trainer. Needs the extra `lightning`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tract_fx import extras
from tract_fx.eager import put_on
from tract_fx.errors import UnsupportedModelError
from tract_fx.passes.choose import LayerChoice
from tract_fx.preconditioner import DEFAULT_LAMBDA

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = extras.load("lightning.pytorch", "Callback")

__all__ = ["TractCallback"]


class TractCallback(Callback):
    """Puts TrAct on a LightningModule's input layer before `fit` makes its optimizers.

    The module stays what it is: its layer gets a TrAct class, and keeps its parameters.

    Args:
        example_inputs: A batch as the module's forward method takes it, or where it has none the
            one net inside it. By default the module's own `example_input_array`, or what a Hugging
            Face model's config tells.
        lambda_: λ > 0, as for `tract_module`.
        layers: Paths of the modules to treat, or a mapping of paths to λ, as for `tract_module`.
        gram: Whose rows the Gram is of, `"local"` or, of all processes, `"global"`.

    Attributes:
        taken: λ by the paths of the layers that TrAct was put on; empty before `fit`.
    """

    def __init__(
        self,
        example_inputs: Any = None,
        *,
        lambda_: float = DEFAULT_LAMBDA,
        layers: LayerChoice = None,
        gram: Literal["local", "global"] = "local",
    ) -> None:
        self._options = (example_inputs, lambda_, layers, gram)
        self.taken: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put TrAct on the module and say on which layers.

        Args:
            trainer: Who calls.
            pl_module: The module.
            stage: What is to be done with it; only `"fit"` needs TrAct.

        Raises:
            UnsupportedModelError: The module makes its layers later, or there is no batch to locate
                them with.
            TractError: As `tract_module`.
        """
        if stage != "fit":
            return
        if not any(True for _ in pl_module.parameters()):
            raise UnsupportedModelError(
                f"{type(pl_module).__name__}, which has no parameters in setup",
                "a module that makes its net in configure_model does so after all callbacks",
                "Apply tract_pass or tract_module to the net there",
            )
        self.taken = put_on(pl_module, *self._options)
        layers = ", ".join(f"{path} (λ = {value:g})" for path, value in self.taken.items())
        say = extras.load("lightning.pytorch.utilities", "rank_zero_info")
        say(f"TrAct is on {layers}")
