"""Facts of a lowered step: compiled for a TPU slice, or read from the cache, and analyzed.

Results are cached in a folder under a hash of the lowered program, the slice, the flags and the versions. The compiled
program's text is stored beside them, so that a changed analysis needs no compilation.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import resource
import time
from collections.abc import Mapping
from typing import Any

import jax

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.json_file import read_json
from neodragon_jax.base.memory import peak_memory_bytes
from train.aot import chips as aot_chips
from train.aot.cost import Cost, analyze
from train.aot.hlo import group_axes, parse
from train.aot.report import Facts, needed_bytes

PACKAGES = ('jax', 'jaxlib', 'libtpu')


def facts_of(
    lowered: Any,
    mesh: jax.sharding.Mesh,
    slice_: aot_chips.Topology,
    flags: Mapping[str, str],
    cache: str | os.PathLike[str],
    lower_s: float,
) -> Facts:
    """Return the facts of a lowered step, from the cache if present.

    Args:
      mesh: of devices of the slice.
      flags: compiler flags.
      cache: folder of results.
      lower_s: seconds that lowering took.
    """
    folder, key = pathlib.Path(cache), _key(lowered.as_text(), slice_, flags)
    record, program_text = folder / f'{key}.json', folder / f'{key}.hlo.gz'
    if not record.is_file():
        _compile(lowered, flags, record, program_text, lower_s)
    facts = read_json(record, Facts)
    return _analyzed(facts, program_text, mesh, slice_) if facts.fits else facts


def _key(lowered_text: str, slice_: aot_chips.Topology, flags: Mapping[str, str]) -> str:
    """Return a short hash of all inputs of a compilation."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    parts = [lowered_text, str(slice_), json.dumps(dict(flags), sort_keys=True), json.dumps(versions)]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:24]


def _compile(
    lowered: Any, flags: Mapping[str, str], record: pathlib.Path, program_text: pathlib.Path, lower_s: float
) -> None:
    """Compile; write the compiler's facts and the program's text."""
    start, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    needed, message, compiled = 0.0, '', None
    try:
        compiled = lowered.compile(compiler_options=dict(flags))
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if 'RESOURCE_EXHAUSTED' not in message:
            raise
        sizes = needed_bytes(message)
        needed = sizes[0] if sizes else 0.0
    usage = resource.getrusage(resource.RUSAGE_SELF)
    facts = Facts(
        fits=compiled is not None,
        needed_bytes=needed,
        lower_s=lower_s,
        compile_s=time.perf_counter() - start,
        compile_cpu_s=usage.ru_utime - cpu,
        compile_rss_bytes=peak_memory_bytes(),
        message=message[:2000],
    )
    if compiled is not None:
        memory = _memory(compiled.memory_analysis())
        xla = compiled.cost_analysis()
        facts = dataclasses.replace(
            facts,
            memory=memory,
            needed_bytes=sum(memory.values()) - 2 * memory['alias'],
            xla_flops=float((xla or {}).get('flops', 0.0)),
        )
        with atomic_file(program_text) as path, gzip.open(path, 'wt', compresslevel=4) as file:
            file.write(compiled.as_text())
    with atomic_file(record) as path:
        path.write_text(json.dumps(dataclasses.asdict(facts), indent=1))


def _memory(stats: Any) -> dict[str, float]:
    """Return bytes by use; aliased bytes are in both arguments and output."""
    return {
        'arguments': stats.argument_size_in_bytes,
        'output': stats.output_size_in_bytes,
        'alias': stats.alias_size_in_bytes,
        'temporaries': stats.temp_size_in_bytes,
        'code': stats.generated_code_size_in_bytes,
    }


def _analyzed(facts: Facts, program_text: pathlib.Path, mesh: Any, slice_: aot_chips.Topology) -> Facts:
    """Return the facts, completed from the program's text."""
    with gzip.open(program_text, 'rt') as file:
        cost = analyze(parse(file.read()), slice_.chip)
    places = [device.coords for device in mesh.devices.flat]
    collectives: dict[tuple[str, str], list[float]] = {}
    for (kind, group), size in cost.collectives.items():
        entry = collectives.setdefault((kind, group_axes(group, mesh.shape)), [0.0, 0.0])
        entry[0] += size
        entry[1] += size / slice_.bandwidth([places[member] for member in group])
    unknown = [f'loop {name}, counted once' for name in sorted(cost.unknown_loops)]
    unknown += [f'{calls:.0f} calls of kernel {name}' for name, calls in cost.unknown_kernels.items()]
    return dataclasses.replace(
        facts,
        # The compiler for a named topology does not always reject a program that is too large.
        fits=facts.needed_bytes <= slice_.chip.hbm_gib * 2**30,
        flops=cost.flops,
        cycles=cost.cycles,
        calibrated_cycles=cost.calibrated,
        collectives=[(kind, axes, *values) for (kind, axes), values in collectives.items()],  # pyright: ignore[reportArgumentType]
        between_slices=_between_slices(cost, slice_.chip),
        kernels=cost.kernels,
        unknown=unknown,
    )


def _between_slices(cost: Cost, chip: aot_chips.Chip) -> list[tuple[str, int, float, float, float]]:
    """Return the rows of `Facts.between_slices`."""
    rows: dict[tuple[str, int], list[float]] = {}
    for transfer, times in cost.transfers.items():
        seconds = transfer.bytes / chip.dcn_bytes
        exposed = max(0.0, seconds - transfer.cycles / chip.clock)
        row = rows.setdefault((transfer.kind, transfer.slices), [0.0, 0.0, 0.0])
        for place, value in enumerate((transfer.bytes, seconds, exposed)):
            row[place] += times * value
    return [(*key, *values) for key, values in rows.items()]  # pyright: ignore[reportReturnType]
