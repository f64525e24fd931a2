"""The compiled steps of a run, and where compiled programs are stored between runs."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from train.runtime import flops
from train.runtime.processes import wait_for_processes
from train.runtime.program import Metrics, Program
from train.runtime.step import Arguments, Carry, jit_step

# Value of `LoopConfig.compile_cache`: a folder in the user's cache, unless JAX has one.
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
      folder: AUTO keeps the folder that JAX is configured with, and otherwise takes one in the user's cache; '' changes
        nothing.
    """
    configured = jax.config.values['jax_compilation_cache_dir']
    if folder == AUTO:
        folder = configured or str(default_cache())
    if folder and configured != folder:
        jax.config.update('jax_compilation_cache_dir', folder)
        compilation_cache.reset_cache()  # JAX opens its cache once, at the first compilation


def default_cache() -> pathlib.Path:
    """Return the folder of compiled programs in the user's cache."""
    cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    return pathlib.Path(cache) / 'neodragon_jax' / 'compiled'
