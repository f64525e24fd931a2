"""The compiled steps of a run, and where compiled programs are stored between runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from neodragon_jax.base import compile_cache
from train.runtime import flops
from train.runtime.processes import wait_for_processes
from train.runtime.program import Metrics, Program
from train.runtime.step import Arguments, Carry, jit_step

# Value of `LoopConfig.compile_cache`: the folder that `base.compile_cache` chooses.
AUTO = 'auto'


class CompiledStep(NamedTuple):
    """A step, and the floating-point operations of its matrix products and convolutions on all devices."""

    run: Callable[..., tuple[Carry, Metrics]]
    flops: float


class CompiledSteps:
    """The steps of a program, each compiled at the first use of its variant, by all processes at that time."""

    def __init__(self, program: Program, abstract: Arguments, say: Callable[[str], None]) -> None:
        """Prepare; nothing is compiled yet."""
        self._program, self._abstract, self._say = program, abstract, say
        self._steps: dict[Hashable, CompiledStep] = {}

    def step(self, variant: Hashable) -> CompiledStep:
        """Return the step of a variant."""
        if variant not in self._steps:
            self._say(f'{self._program.name}: compiling the step of variant {variant!r}')
            traced = jit_step(self._program, variant, self._abstract).trace(*self._abstract)
            counted = flops.count(traced.jaxpr).total
            self._steps[variant] = CompiledStep(traced.lower().compile(), counted)
            wait_for_processes()
        return self._steps[variant]


def use_compile_cache(folder: str) -> None:
    """Store compiled programs in a folder from now on, for all of this process.

    Args:
      folder: AUTO is the folder that JAX is configured with, or else one in the user's cache; '' changes nothing.
    """
    if folder == AUTO:
        compile_cache.use_compile_cache()
    elif folder and jax.config.values['jax_compilation_cache_dir'] != folder:
        jax.config.update('jax_compilation_cache_dir', folder)
        compilation_cache.reset_cache()  # JAX opens its cache once, at the first compilation
