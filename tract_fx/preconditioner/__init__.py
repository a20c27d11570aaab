"""TrAct's preconditioner: patch geometry, Gram, solve, and the op that carries it in a graph.

Imports nothing from the rest of the package but errors and the list of private torch functions.
"""

from tract_fx.preconditioner.direct import is_quicker
from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.gram_matrix import GramWork, gram, gram_algorithm, gram_work
from tract_fx.preconditioner.layer_kinds import (
    GEOMETRY,
    LAYER_CALLS,
    LAYER_KINDS,
    OPERANDS,
    kind_of,
    op_name,
)
from tract_fx.preconditioner.op import multiply, precondition_grad, refuse_script
from tract_fx.preconditioner.operators import PRECONDITION_GRAD_OPERATOR, to_training_graph
from tract_fx.preconditioner.process_groups import (
    WORLD,
    GramScope,
    GroupChoice,
    group_name,
    group_of,
)
from tract_fx.preconditioner.settings import DEFAULT_LAMBDA, LAMBDA_REMEDY, check_lambda
from tract_fx.preconditioner.solve import (
    SolvePlan,
    plan_solve,
    precondition_by_plan,
    precondition_weight_gradient,
)

__all__ = [
    "DEFAULT_LAMBDA",
    "GEOMETRY",
    "LAMBDA_REMEDY",
    "LAYER_CALLS",
    "LAYER_KINDS",
    "OPERANDS",
    "PRECONDITION_GRAD_OPERATOR",
    "WORLD",
    "GramScope",
    "GramWork",
    "GroupChoice",
    "PatchGeometry",
    "SolvePlan",
    "check_lambda",
    "gram",
    "gram_algorithm",
    "gram_work",
    "group_name",
    "group_of",
    "is_quicker",
    "kind_of",
    "multiply",
    "op_name",
    "plan_solve",
    "precondition_by_plan",
    "precondition_grad",
    "precondition_weight_gradient",
    "refuse_script",
    "to_training_graph",
]
