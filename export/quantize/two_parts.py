"""Selection of the layers of a W8A16 graph whose weights are stored in two parts: as few as the target requires.

Most of the error comes from rounding weights to 8 bits. A layer can instead run twice: once with its weights rounded to
8 bits, and once with the residual of that rounding, also in 8 bits. The sum has almost 16 bits. Native 16-bit weights
are no substitute: convolutions with them were 20 to 40 dB worse than expected on the HTP simulator.

The contribution of each weight to the error is measured by rounding it alone, see rounding_noise.py. Groups of weights
are then doubled in the order of error per byte until the remaining error fits the target. `recipe.json`, beside the
graph, lists the weights in two parts with the measured reasons.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.graphs.runners import Call, OnnxSession
from export.graphs.to_onnx import save
from export.measure.snr import call_db, join_outputs, lowest_db
from export.quantize.adaround import Rounding
from export.quantize.key_value import MARGIN_DB, RECIPE, WIDE_BITS, choose_bits
from export.quantize.qdq import has_computed_operands, quantize
from export.quantize.rounding_noise import LAYER_AXES, Group, rounded, rounding_noise
from export.rewrite.onnx_graph import constants_of, drop_unused, new_constant, replace_nodes, write_shapes
from neodragon_jax.base.json_file import read_json

# The search trusts the sum of measured noise to this much.
TOLERANCE_DB = 1.0


def quantize_to_target(
    source: pathlib.Path,
    destination: pathlib.Path,
    ranges: pathlib.Path,
    calls: Sequence[Call],
    compared: Sequence[str],
    target_db: float,
    rounding: Rounding | None = None,
    search: bool = True,
) -> tuple[list[str], float]:
    """Write the W8A16 form of a float graph, with as many weights in two parts as required, and its recipe.

    Args:
      ranges: file with the ranges of the activations.
      calls: validation calls with their float outputs, to measure the ratio on. Contributions of the layers to the
        error are measured on the call with the lowest ratio.
      compared: names of the outputs that are compared.
      rounding: rounding of the weights that stay in one part; None rounds to nearest.
      search: whether weights may be stored in two parts.
    Returns:
      The names of the weights in two parts, and the lowest ratio on `calls` in dB; it is below the target if no
      selection reaches the target.
    """
    aim = target_db + MARGIN_DB
    found: dict[int, Doubling] = {}

    @functools.cache  # it does not depend on the bits of keys and values
    def noise_on(index: int) -> tuple[list[Group], float]:
        squares = np.square(join_outputs(calls[index].outputs, compared), dtype=np.float64)
        return rounding_noise(source, calls[index], compared, rounding), float(squares.sum())

    def write(bits: int) -> float:
        doubled_db = functools.partial(_quantize_doubled, source, destination, ranges, calls, compared, rounding, bits)
        if bits in found:
            doubled_db(found[bits].names)
            return found[bits].reached_db
        doubled_db([])
        plain, worst = _worst(destination, calls, compared)
        groups, signal = noise_on(worst) if search and plain < aim else ([], 1.0)
        found[bits] = double(groups, plain, signal, aim, doubled_db)
        return found[bits].reached_db

    if has_computed_operands(source):
        chosen = choose_bits(write, aim)
        result, recipe = found[chosen.bits], chosen.recipe()
    else:
        write(WIDE_BITS)
        result, recipe = found[WIDE_BITS], {}
    recipe |= {'target_db': target_db, 'plain_db': result.plain_db, 'reached_db': result.reached_db}
    destination.with_name(RECIPE).write_text(json.dumps(result.recipe() | recipe, indent=2) + '\n')
    return result.names, result.reached_db


@dataclasses.dataclass(frozen=True)
class Doubling:
    """Outcome of the search.

    Attributes:
      groups: groups of weights, the highest noise per byte first.
      count: number of leading groups in two parts.
      signal: squared norm of the outputs; noise is relative to it.
      plain_db, reached_db: lowest ratio without and with second parts.
    """

    groups: Sequence[Group]
    count: int
    signal: float
    plain_db: float
    reached_db: float

    @property
    def names(self) -> list[str]:
        """Weights in two parts."""
        return _names(self.groups[: self.count])

    def recipe(self) -> dict[str, Any]:
        """Return the entry of recipe.json: the noise of every group, and whether it is in two parts."""
        entries = [
            {
                'weights': list(group.names),
                'bytes': group.size,
                'db_if_alone_rounded': 10 * math.log10(self.signal / max(group.noise, self.signal * 1e-30)),
                'in_two_parts': index < self.count,
            }
            for index, group in enumerate(self.groups)
        ]
        return {'groups': entries}


def double(
    groups: Sequence[Group], plain_db: float, signal: float, aim_db: float, doubled_db: Callable[..., float]
) -> Doubling:
    """Double groups in the order of noise per byte until a ratio is reached or all are doubled.

    If a trial leaves more noise than its undoubled groups explain, doubling all of them shows whether any selection
    can reach the ratio. If none can, the search ends.

    Args:
      signal: squared norm of the outputs; noise is relative to it.
      doubled_db: writes the graph with some weights in two parts and returns its lowest ratio.
    """
    groups = sorted(groups, key=lambda group: -group.noise / group.size)
    remaining = np.cumsum([0.0, *(group.noise for group in reversed(groups))])[::-1]
    count, written, best, allowed_db, bound = 0, 0, (plain_db, 0), aim_db, math.inf
    while best[0] < aim_db <= bound and count < len(groups):
        count = max(count + 1, int(np.argmax(remaining <= _noise(signal, allowed_db))))
        reached, written = doubled_db(_names(groups[:count])), count
        best = max(best, (reached, count))
        allowed_db += max(3.0, aim_db - reached)
        unexplained = _noise(signal, reached) - remaining[count]
        if bound == math.inf and unexplained > _noise(signal, aim_db - TOLERANCE_DB):
            bound, written = doubled_db(_names(groups)), len(groups)
            if bound < aim_db:
                best = max(best, (bound, written))
    if best[1] != written:
        doubled_db(_names(groups[: best[1]]))
    return Doubling(groups, best[1], signal, plain_db, best[0])


def _noise(signal: float, ratio_db: float) -> float:
    """Return the squared error at a ratio."""
    return signal / 10 ** (ratio_db / 10)


def _worst(path: pathlib.Path, calls: Sequence[Call], compared: Sequence[str]) -> tuple[float, int]:
    """Return the lowest ratio of a graph over the calls, and the index of the call that has it."""
    session = OnnxSession(path)
    ratios = [call_db(session, call, compared) for call in calls]
    return min(ratios), ratios.index(min(ratios))


def _names(groups: Sequence[Group]) -> list[str]:
    return [name for group in groups for name in group.names]


def _quantize_doubled(
    source: pathlib.Path,
    destination: pathlib.Path,
    ranges: pathlib.Path,
    calls: Sequence[Call],
    compared: Sequence[str],
    rounding: Rounding | None,
    key_value_bits: int,
    doubled: Collection[str],
) -> float:
    """Write the W8A16 form with the weights `doubled` in two parts; return the lowest ratio, NaN if none is doubled."""
    if not doubled:
        quantize(source, destination, ranges, rounding, key_value_bits)
        return math.nan
    path = source.with_name(f'.{source.stem}.doubled.onnx')
    extended = destination.with_name('ranges-doubled.json')
    try:
        model = onnx.load(source, load_external_data=False)
        parts = double_weights(model.graph, doubled, source.parent)
        save(model, path)
        extended.write_text(json.dumps(_with_parts(read_json(ranges, dict[str, Any]), parts)))
        quantize(path, destination, extended, rounding, key_value_bits)
    finally:
        for file in path.parent.glob(f'{path.name}*'):
            file.unlink()
    return lowest_db(OnnxSession(destination), calls, compared)


def _with_parts(ranges: dict[str, Any], results: Collection[str]) -> dict[str, Any]:
    """Add the ranges of the two parts of some results to ranges as `measure_ranges` writes them.

    The first part has the range of the sum. The second part, from the rounding residual, is about a hundredth of the
    sum. A quarter of the range holds it even where the sum is small through cancellation, at a sufficient resolution.
    """
    known = ranges['data']
    for name in results:
        whole = known[name]
        end = max(-whole['lowest'], whole['highest']) / 4
        known |= {f'{name}_coarse': whole, f'{name}_fine': whole | {'lowest': -end, 'highest': end}}
    return ranges


def write_in_two_parts(source: pathlib.Path, destination: pathlib.Path) -> None:
    """Write a float graph with the weights of all its layers in two parts."""
    model = onnx.load(source, load_external_data=False)
    constants = constants_of(model.graph)
    names = {node.input[1] for node in model.graph.node if node.op_type in LAYER_AXES}
    double_weights(model.graph, names & constants.keys(), source.parent)
    save(model, destination)


def double_weights(graph: onnx.GraphProto, names: Collection[str], folder: pathlib.Path) -> list[str]:
    """Run layers twice, with their weights rounded to 8 bits and with the rounding residual, and add the results.

    Args:
      names: names of the weights.
      folder: location of external weights.
    Returns:
      The names of the layers' results; those of the parts end in `_coarse` and `_fine`.
    """
    constants, nodes, results = constants_of(graph), [], []
    for node in graph.node:
        if node.op_type not in LAYER_AXES or node.input[1] not in names:
            nodes.append(node)
            continue
        weight, result = node.input[1], node.output[0]
        array = numpy_helper.to_array(constants[weight], str(folder))
        coarse = rounded(array, LAYER_AXES[node.op_type])
        parts = [onnx.NodeProto.FromString(node.SerializeToString()) for _ in range(2)]
        for part, kind, values in zip(parts, ('coarse', 'fine'), (coarse, array - coarse), strict=True):
            part.name, part.output[0] = f'{node.name}_{kind}', f'{result}_{kind}'
            part.input[1] = new_constant(graph, constants, f'{weight}_{kind}', values)
        del parts[1].input[2:]  # the bias is in the first part
        total = helper.make_node('Add', [part.output[0] for part in parts], [result], name=f'{node.name}_sum')
        nodes += [*parts, total]
        results.append(result)
    replace_nodes(graph, nodes)
    drop_unused(graph)
    write_shapes(graph)
    return results
