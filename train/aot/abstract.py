"""Programs as shapes: how `train.aot` builds a program with no checkpoint, no data and no memory.

The convention: the settings file configs/NAME.py belongs to the module train/NAME.py, which has

    def abstract_program(settings: ConfigDict) -> AbstractProgram

with what its `main` would hand to `loop.run`, except that its frozen parameters are abstract and its source needs no
data (`train.data.sources.Repeated`). Where the settings name no checkpoint and no data it takes the published sizes.
The settings that `train.aot` varies are found by name: `loop.mesh`, `loop.batch_size`, and in any section `remat`,
`attention`, `memory` and `accumulate`.
"""

from __future__ import annotations

import importlib
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from neodragon_jax.base.errors import InputError
from train.data import Source
from train.runtime.loop import LoopConfig, Program

# Steps that are looked at to find all variants of a program's step.
STEPS_SEEN = 1000


class AbstractProgram(NamedTuple):
    """A program that can be compiled but not run."""

    program: Program
    source: Source
    run: LoopConfig


def program_name(config_file: str) -> str:
    """Return NAME of configs/NAME.py:PRESET."""
    return pathlib.Path(config_file.partition(':')[0]).stem


def build(name: str, settings: ConfigDict) -> AbstractProgram:
    """Return the abstract program of train/NAME.py.

    Raises:
      InputError: there is no such program, it cannot be sized, or a setting is wrong.
    """
    module = None
    for path in (f'train.{name}.program', f'train.{name}'):
        try:
            module = importlib.import_module(path)
            break
        except ModuleNotFoundError as error:
            if not f'{path}.'.startswith(f'{error.name}.'):
                raise
    if module is None:
        raise InputError(f'configs/{name}.py belongs to no program: there is no train/{name}.')
    if hasattr(module, 'RECIPE'):
        return AbstractProgram(*module.RECIPE.size(settings))
    if not hasattr(module, 'abstract_program'):
        raise InputError(f'train/{name}.py has no abstract_program(settings); see train/aot/abstract.py.')
    return module.abstract_program(settings)


def variants(program: Program) -> dict[Any, float]:
    """Return the variants of a program's steps with their shares of all steps."""
    seen = [program.variant(step) for step in range(STEPS_SEEN)]
    return {variant: seen.count(variant) / len(seen) for variant in sorted(set(seen))}  # pyright: ignore[reportArgumentType]
