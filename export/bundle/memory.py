"""The memory plan of a bundle: which graphs are loaded together, and the bytes that they take.

A phase takes its files, which a runtime holds in memory, and the inputs and outputs of its graphs. Embedding tables are
mapped into memory, not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from export.bundle.meanings import PHASES

# Most bytes that a phase may take on a phone. Source: arXiv 2511.06055, section 4 (peak memory of 3.5 GB).
BUDGET = 3_500_000_000
_FLOAT_BYTES = 4


def phases(manifest: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the phases of a bundle: name, graphs, and bytes by place (`portable`, or a chipset).

    Args:
      manifest: its `graphs`, `chipsets` and `binaries`.
      files: `bytes` of every file.
    """
    graphs, found = manifest['graphs'], []
    for phase, names in PHASES:
        present = [name for name in names if name in graphs]
        if not present:
            continue
        found.append({'name': phase, 'graphs': present, 'bytes': _bytes_by_place(present, manifest, files)})
    return found


def _bytes_by_place(
    names: Sequence[str], manifest: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, int]:
    """Return the bytes of graphs and their tensors by place; arguments as of `phases`."""
    graphs = manifest['graphs']
    tensors = sum(_tensor_bytes(graphs[name]) for name in names)
    held = {'portable': tensors + sum(files[path]['bytes'] for name in names for path in graphs[name]['portable'])}
    for chipset in manifest['chipsets']:
        # A binary that graphs share is in memory once.
        used = {
            entry['file']
            for entry in manifest['binaries']
            if entry['chipset'] == chipset and set(entry['graphs']) & set(names)
        }
        held[chipset] = tensors + sum(files[path]['bytes'] for path in used)
    return held


def memory(plan: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the budget in bytes, and the largest phase by place.

    Args:
      plan: as returned by `phases`.
    """
    largest = {}
    for place in plan[0]['bytes']:
        phase = max(plan, key=lambda entry: entry['bytes'][place])
        largest[place] = {'phase': phase['name'], 'bytes': phase['bytes'][place]}
    return {'budget': BUDGET, 'largest': largest}


def _tensor_bytes(graph: Mapping[str, Any]) -> int:
    """Return the bytes of a graph's inputs and outputs."""
    specs = (*graph['inputs'].values(), *graph['outputs'].values())
    return sum(_FLOAT_BYTES * math.prod(spec['shape']) for spec in specs)
