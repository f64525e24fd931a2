"""Model FLOPs of a step: those of its algorithm, without recomputation and padding.

MFU, of a run and of `train.aot`, divides them by the devices' peak (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
from flax import linen as nn
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval

from train.runtime import flops
from train.runtime.platform import ELSEWHERE
from train.runtime.program import Program
from train.runtime.step import Arguments, guarded_step

Module = TypeVar('Module', bound=nn.Module)


def plain(program: Program) -> Program:
    """Return the program without recomputation and padding; itself if it has none."""
    return getattr(program, 'plain', lambda: program)()


def plain_denoiser(module: Module) -> Module:
    """Return a denoiser without recomputation and padding."""
    return module.clone(remat='none', attention=ELSEWHERE)  # pyright: ignore[reportCallIssue]


def of_step(program: Program, variant: Hashable, arguments: Arguments) -> float:
    """Return the model FLOPs of a step over all devices, by tracing the plain program's.

    Args:
      arguments: abstract arguments of the step; their shardings do not matter.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    return traced_flops(functools.partial(guarded_step, plain(program), variant), *shapes)


def traced_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the FLOPs of the matrix products and convolutions in a traced function, without compiling it."""
    return needed_flops(jax.make_jaxpr(function)(*arguments))


def needed_flops(closed: ClosedJaxpr) -> float:
    """Return the FLOPs of a trace, without operations that no output needs, such as gradients of constants."""
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    counted = flops.count(needed)
    if counted.open_loops:
        raise NotImplementedError('products in a loop of unknown length; use lax.scan.')
    return counted.total
