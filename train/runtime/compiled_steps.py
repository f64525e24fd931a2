"""The compiled steps of a run, and the cache of compiled programs between runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core import ClosedJaxpr

from neodragon_jax.base import compile_cache
from neodragon_jax.base.bucket import StoragePath, check_bucket, is_bucket
from train.runtime import model_flops
from train.runtime.processes import wait_for_processes
from train.runtime.program import Metrics, Program
from train.runtime.step import Arguments, Carry, jit_step

# Value of `LoopConfig.compile_cache`: the folder that `base.compile_cache` chooses.
AUTO = 'auto'


class CompiledStep(NamedTuple):
    """A compiled step, and its model FLOPs over all devices."""

    run: Callable[..., tuple[Carry, Metrics]]
    flops: float


class CompiledSteps:
    """The steps of a program; each variant is compiled at its first use, by all processes at the same time."""

    def __init__(self, program: Program, abstract: Arguments, print_line: Callable[[str], None]) -> None:
        """Store the arguments; nothing is compiled yet."""
        self._program, self._abstract, self._print_line = program, abstract, print_line
        self._steps: dict[Hashable, CompiledStep] = {}

    def step(self, variant: Hashable) -> CompiledStep:
        """Return the step of a variant."""
        if variant not in self._steps:
            self._print_line(f'{self._program.name}: compiling the step of variant {variant!r}')
            traced = jit_step(self._program, variant, self._abstract).trace(*self._abstract)
            counted = self._model_flops(variant, traced.jaxpr)
            self._steps[variant] = CompiledStep(traced.lower().compile(), counted)
            wait_for_processes()
        return self._steps[variant]

    def _model_flops(self, variant: Hashable, trace: ClosedJaxpr) -> float:
        """Return the model FLOPs of a step, of its own trace if it recomputes nothing."""
        if model_flops.plain(self._program) is self._program:
            return model_flops.needed_flops(trace)
        return model_flops.of_step(self._program, variant, self._abstract)


def use_compile_cache(folder: str, workdir: StoragePath) -> None:
    """Enable JAX's compilation cache in a folder, for the whole process.

    Args:
      folder: AUTO is the folder that JAX is configured with, or otherwise the one that `base.compile_cache` chooses; ''
        changes nothing.
      workdir: folder of the run.
    """
    if folder == AUTO:
        shared = workdir if jax.process_count() > 1 else None
        compile_cache.use_compile_cache(tell=jax.process_index() == 0, shared=shared)
    elif folder and jax.config.values['jax_compilation_cache_dir'] != folder:
        if is_bucket(folder):
            check_bucket(folder, 'config.loop.compile_cache', write=True)
        jax.config.update('jax_compilation_cache_dir', folder)
        compilation_cache.reset_cache()  # JAX opens its cache once, at the first compilation
