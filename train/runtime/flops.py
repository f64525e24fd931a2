"""FLOPs of a function, counted in its jaxpr.

The count covers the multiplications and additions of matrix products and convolutions over all devices. A loop body is
multiplied by its trip count (XLA's cost analysis counts it once), and rematerialized products count again
(`model_flops.py` leaves them out). Elementwise operations, reductions, softmax and norms are not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params


@dataclasses.dataclass(frozen=True)
class Flops:
    """A count of FLOPs.

    Attributes:
      open_loops: number of loops of data-dependent length; their bodies are counted once.
    """

    total: float = 0.0
    open_loops: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.total + other.total, self.open_loops + other.open_loops)

    def times(self, rounds: float) -> Flops:
        """Return the count of several repetitions; the number of open loops is unchanged."""
        return Flops(self.total * rounds, self.open_loops)


def count(jaxpr: Jaxpr | ClosedJaxpr) -> Flops:
    """Return the floating-point operations of a function, such as `jax.jit(f).trace(*abstract).jaxpr`."""
    equations = jaxpr.jaxpr.eqns if isinstance(jaxpr, ClosedJaxpr) else jaxpr.eqns
    return sum((_count_equation(equation) for equation in equations), Flops())


def _count_equation(equation: JaxprEqn) -> Flops:
    """Return the count of one operation, including the functions inside it."""
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        return Flops(_dot(equation))
    if name == 'conv_general_dilated':
        return Flops(_convolution(equation))
    if name == 'cond':
        return max((count(branch) for branch in params['branches']), key=lambda flops: flops.total)
    inside = sum((count(body) for body in jaxprs_in_params(params)), Flops())
    if name == 'while':
        return inside + Flops(0.0, 1 if inside.total else 0)
    return inside.times(_rounds(name, params))


def _rounds(name: str, params: dict[str, Any]) -> int:
    """Return the number of executions of the functions inside an operation, over all devices."""
    if name == 'scan':
        return params['length']
    if name == 'shard_map':
        return math.prod(params['mesh'].shape[axis] for axis in params['newly_manual_axes'])
    if name == 'pallas_call':
        return math.prod(size for size in params['grid_mapping'].grid if isinstance(size, int))
    return 1


def _dot(equation: JaxprEqn) -> float:
    """Return the count of a matrix product: 2 x elements of the result x length of the contraction."""
    (contracted, _), _ = equation.params['dimension_numbers']
    left = _shape(equation.invars[0])
    return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: JaxprEqn) -> float:
    """Return the count of a convolution, including products with its padding.

    Products with the zeros between the inputs of a transposed convolution are excluded; the gradient of a strided
    convolution is one of these.
    """
    params = equation.params
    kernel, out = _shape(equation.invars[1]), _shape(equation.outvars[0])
    per_output = math.prod(kernel) / kernel[params['dimension_numbers'].rhs_spec[0]]
    return 2.0 * math.prod(out) * per_output / math.prod(params['lhs_dilation'])


def _shape(variable: Any) -> Sequence[int]:
    return variable.aval.shape
