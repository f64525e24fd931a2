"""Worker process of `train.aot`: compiles one step for a named TPU slice.

The process is separate because libtpu installs signal handlers, writes logs and looks for a TPU. The request is JSON on
standard input; the facts are written to a file.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from ml_collections import ConfigDict

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import parse_json
from train.aot import chips as aot_chips
from train.aot.compilation import facts_of
from train.aot.report import Facts
from train.aot.request import INPUT_ERROR, Request
from train.runtime import loop, runner
from train.runtime.sharding import make_mesh
from train.runtime.step import variants


def answer(request: Request) -> Facts:
    """Return the facts, from the cache if present."""
    slice_ = aot_chips.topology(request.topology, request.slices)
    program = runner.size(request.program, ConfigDict(parse_json(request.settings, dict[str, Any], 'settings')))
    start = time.perf_counter()
    lowered, mesh = lower(program, request.variant, slice_)
    lower_s = time.perf_counter() - start
    return facts_of(lowered, mesh, slice_, request.flags, request.cache, lower_s)


def lower(program: runner.Training, variant: str, slice_: aot_chips.Topology) -> tuple[Any, Any]:
    """Return the lowered step, identical to the one that `loop.run` compiles, and its mesh."""
    mesh = make_mesh(program.run.mesh, slice_.compile_devices())
    arguments = loop.abstract_arguments(program.program, program.program.frozen(), program.source, program.run, mesh)
    by_name = {str(value): value for value in variants(program.program)}
    step = loop.jit_step(program.program, by_name[variant], arguments)
    return step.lower(*arguments), mesh


def main() -> int:
    """Answer the request on standard input; write the facts, or a one-line error message, to a file."""
    result = pathlib.Path(sys.argv[1])
    try:
        facts = answer(parse_json(sys.stdin.read(), Request, 'request'))
    except InputError as error:
        result.write_text(str(error))
        return INPUT_ERROR
    result.write_text(json.dumps(dataclasses.asdict(facts)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
