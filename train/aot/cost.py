"""Cost of a compiled program, read from its optimized HLO text: arithmetic, cycles and communication per device.

XLA's own `cost_analysis` counts the body of a loop once, and most of a training step is loops. Here a loop body is
multiplied by its trip count. All numbers are per device and per call of the program:

  FLOPs         two per multiply-accumulate of matrix products and convolutions; products with padding and element-wise
                operations are not counted
  cycles        the TPU compiler's estimates, which exclude collectives and custom kernels
  calibrated    the same, corrected where the compiler is known to be wrong, see `_calibrated`
  collectives   bytes that a device must receive with the best algorithm, by kind and group, inside a slice
  transfers     the same between slices, with the cycles of the operations that run meanwhile
  kernels       calls of custom (Pallas) kernels, and their FLOPs where the arithmetic is known
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

from neodragon_jax.models.operands import NAME as OPERAND_KERNEL
from train.aot.chips import Chip
from train.aot.collectives import COLLECTIVES, Transfer, transfer_of
from train.aot.hlo import Computation, Instruction, Module, first_group, group_axes, integers, trip_count
from train.aot.traffic import moved_bytes

# Share of the memory's rate that operations reach; share of the peak rate below which a fusion is more than a product,
# and the share that the product in such a fusion reaches.
MEMORY_BUSY, SLOWEST_PRODUCT, PLAIN_PRODUCT = 0.8, 0.25, 0.5

# Prefix of a custom kernel's name -> number of its matrix products of [rows, keys] with the head dimension. Splash
# attention computes scores and values in the forward pass. The backward pass recomputes the scores and computes four
# gradients, or three and two of these products in separate kernels.
ATTENTION_KERNELS = {'splash_mha_fwd': 2, 'splash_mha_dkv': 5, 'splash_mha_dq': 3}

# Prefixes of the names of kernels that are bound by memory: they take the time to read their operands and write their
# results. By the compiler's schedules, the arithmetic of these takes 52 to 99% of that time on v5e and v6e
# (`train.measure.kernel`).
MEMORY_KERNELS = (OPERAND_KERNEL,)


@dataclasses.dataclass
class Cost:
    """Cost of one execution of a computation.

    Attributes:
      collectives: (kind, ids of the devices of one group) -> bytes received by a device.
      transfers: transfer between slices -> number of times.
      kernels: name of a custom kernel -> (calls, FLOPs).
      unknown_kernels: calls of kernels whose arithmetic is not known.
      unknown_loops: names of loops whose trip count could not be read; each body counts once.
    """

    flops: float = 0.0
    cycles: float = 0.0
    calibrated: float = 0.0
    collectives: Counter[tuple[str, tuple[int, ...]]] = dataclasses.field(default_factory=Counter)
    transfers: Counter[Transfer] = dataclasses.field(default_factory=Counter)
    kernels: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    unknown_kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: Cost, times: float = 1) -> None:
        """Add a cost, multiplied by `times`."""
        self.flops += times * other.flops
        self.cycles += times * other.cycles
        self.calibrated += times * other.calibrated
        for key, value in other.collectives.items():
            self.collectives[key] += times * value  # pyright: ignore[reportArgumentType]
        for transfer, count in other.transfers.items():
            self.transfers[transfer] += times * count  # pyright: ignore[reportArgumentType]
        for name, (calls, flops) in other.kernels.items():
            have = self.kernels.get(name, (0.0, 0.0))
            self.kernels[name] = have[0] + times * calls, have[1] + times * flops
        for name, calls in other.unknown_kernels.items():
            self.unknown_kernels[name] += times * calls  # pyright: ignore[reportArgumentType]
        self.unknown_loops |= other.unknown_loops


def analyze(module: Module, chip: Chip | None = None) -> Cost:
    """Return the cost of one call of a program on one device.

    Args:
      chip: its rates calibrate the cycles; without it they stay as the compiler estimates them.
    """
    return _CallGraph(module, chip).cost(module.entry)


class _CallGraph:
    """Sum of costs over the call graph; each computation is analyzed once."""

    def __init__(self, module: Module, chip: Chip | None) -> None:
        self._module, self._chip = module, chip
        self._costs: dict[str, Cost] = {}
        self._fused: dict[str, set[str]] = {}

    def cost(self, name: str) -> Cost:
        """Return the cost of a computation."""
        if name not in self._costs:
            total, computation = Cost(), self._module.computations[name]
            channels: set[tuple[str, str]] = set()
            begun: dict[str, tuple[float, Instruction]] = {}
            for instruction in computation.values():
                _follow_transfer(total, instruction, computation, begun)
                self._add(total, instruction, computation, channels)
            self._costs[name] = total
        return self._costs[name]

    def _add(
        self, total: Cost, instruction: Instruction, computation: Computation, channels: set[tuple[str, str]]
    ) -> None:
        """Add one instruction of a computation outside fusions."""
        before = total.flops
        match instruction.opcode:
            case 'while':
                times = trip_count(self._module, instruction, computation)
                if times is None:
                    total.unknown_loops.add(instruction.name)
                total.add(self.cost(instruction.called('body')[0]), 1 if times is None else times)
                return
            case 'conditional':
                names = ('branch_computations', 'true_computation', 'false_computation')
                branches = [self.cost(name) for name in instruction.called(*names)]
                total.add(max(branches, key=lambda cost: (cost.cycles, cost.flops)))
                return
            case 'call':
                total.add(self.cost(instruction.called('to_apply')[0]))
                return
            case 'custom-call' if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
                _add_kernel(total, instruction, computation, self._chip)
            case 'fusion' | 'async-start':
                for name in instruction.called('calls'):
                    self._add_fused(total, name, channels)
            case _:
                self._add_plain(total, instruction, computation, channels)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        cycles = float(estimate.group(1)) if estimate else 0.0
        total.cycles += cycles
        total.calibrated += self._calibrated(cycles, total.flops - before, instruction, computation)

    def _calibrated(self, cycles: float, flops: float, instruction: Instruction, computation: Computation) -> float:
        """Return the calibrated cycles of an instruction.

        The compiler's cycles of matrix products are plausible; those of operations that are bound by memory are far too
        high. The former take at least, the latter at most, the time to move their bytes at MEMORY_BUSY of the memory's
        rate.

        Args:
          flops: of its matrix products.
        """
        if self._chip is None or not cycles:
            return cycles
        opcodes = {instruction.opcode} | {
            name for called in instruction.called('calls') for name in self._opcodes(called)
        }
        moved = moved_bytes(instruction, computation, opcodes)
        memory = moved / (MEMORY_BUSY * self._chip.hbm_bytes / self._chip.clock)
        if not flops:
            return min(cycles, memory)
        ideal = flops / self._chip.flops_per_cycle
        # A product far below the peak rate is one of a fusion whose cycles are mostly memory traffic.
        return max(memory, cycles if ideal > SLOWEST_PRODUCT * cycles else ideal / PLAIN_PRODUCT)

    def _opcodes(self, name: str) -> set[str]:
        """Return the opcodes in a fused computation."""
        if name not in self._fused:
            found = self._module.computations[name].values()
            inner = [self._opcodes(called) for item in found for called in item.called('calls', 'to_apply')]
            self._fused[name] = set().union({item.opcode for item in found}, *inner)
        return self._fused[name]

    def _add_fused(self, total: Cost, name: str, channels: set[tuple[str, str]]) -> None:
        """Add the arithmetic and communication inside a fusion. The cycles are given for the fusion as a whole."""
        computation = self._module.computations[name]
        for instruction in computation.values():
            if instruction.opcode in ('fusion', 'call', 'async-start'):
                for called in instruction.called('calls', 'to_apply'):
                    self._add_fused(total, called, channels)
            else:
                # The TPU compiler writes a reduce-scatter as an all-reduce and slices of its results, fused.
                self._add_plain(total, instruction, computation, channels, name.startswith('all-reduce-scatter'))

    def _add_plain(
        self,
        total: Cost,
        instruction: Instruction,
        computation: Computation,
        channels: set[tuple[str, str]],
        scattered: bool = False,
    ) -> None:
        """Add a matrix product or a collective.

        Args:
          scattered: whether an all-reduce is a reduce-scatter.
        """
        kind = instruction.opcode.removesuffix('-start')
        if scattered and kind == 'all-reduce':
            kind = 'reduce-scatter'
        if kind in ('dot', 'convolution'):
            total.flops += product_flops(instruction, computation)
        elif kind in COLLECTIVES:
            # A collective may be split over several fusions for overlap; its parts share one channel.
            channel = re.search(r'channel_id=(\d+)', instruction.attributes)
            key = kind, channel.group(1) if channel else instruction.name
            if key not in channels:
                channels.add(key)
                group = first_group(instruction.attributes, self._module.devices)
                sent = sum(shape.bytes for name in instruction.operands for shape in computation[name].shapes)
                size = len(group)
                total.collectives[kind, group] += COLLECTIVES[kind](size) * sent  # pyright: ignore[reportArgumentType]


def _follow_transfer(
    total: Cost, instruction: Instruction, computation: Computation, begun: dict[str, tuple[float, Instruction]]
) -> None:
    """Note the start of a transfer between slices, and add it at its end; instructions come in the compiled order.

    Raises:
      ValueError: the kind of the transfer is unknown.
    """
    meeting = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', instruction.attributes)
    if meeting and instruction.opcode == 'send' and '_xla_megascale_transfer_type' in instruction.attributes:
        begun[meeting.group(1)] = total.cycles, instruction
    elif instruction.opcode == 'recv-done':
        (start,) = instruction.operands
        meeting = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', computation[start].attributes)
        if meeting is None or meeting.group(1) not in begun:
            return
        cycles, send = begun.pop(meeting.group(1))
        sent = computation[send.operands[0]].shapes[0].bytes
        total.transfers[transfer_of(send, sent, total.cycles - cycles)] += 1


def product_flops(instruction: Instruction, computation: Computation) -> float:
    """Return the FLOPs of a `dot` or a `convolution`; on TPUs every matrix product is a convolution."""
    out = instruction.shapes[0]
    left, right = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    if instruction.opcode == 'dot':
        contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)
        assert contracted is not None
        return 2.0 * out.size * math.prod(left[axis] for axis in integers(contracted.group(1)))
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
    assert labels is not None
    left_labels, right_labels, out_labels = labels.groups()
    window = _window(instruction.attributes, sum(label.isdigit() for label in out_labels))
    products = math.prod(
        _valid_products(
            left[left_labels.index(str(axis))],
            right[right_labels.index(str(axis))],
            out.dims[out_labels.index(str(axis))],
            *settings,
        )
        for axis, settings in enumerate(window)
    )
    batch, features = (out.dims[out_labels.index(label)] for label in 'bf')
    return 2.0 * batch * features * right[right_labels.index('i')] * products


def _window(attributes: str, axes: int) -> list[tuple[int, int, int, int]]:
    """Return (stride, padding before, input dilation, window dilation) of each spatial axis."""
    text = re.search(r'window=\{([^}]*)\}', attributes)
    fields = dict(field.split('=') for field in text.group(1).split()) if text else {}
    column = lambda name, default: fields[name].split('x') if name in fields else [default] * axes
    before = [int(pad.split('_')[0]) for pad in column('pad', '0_0')]
    strides, inputs, windows = (
        [int(value) for value in column(name, '1')] for name in ('stride', 'lhs_dilate', 'rhs_dilate')
    )
    return list(zip(strides, before, inputs, windows, strict=True))


@functools.lru_cache
def _valid_products(size: int, window: int, out: int, stride: int, pad: int, dilate: int, window_dilate: int) -> int:
    """Return the number of (output, window) positions of an axis that read an input element, not padding or a hole."""
    place = np.arange(out)[:, None] * stride + np.arange(window)[None] * window_dilate - pad
    return int(np.count_nonzero((place >= 0) & (place < (size - 1) * dilate + 1) & (place % dilate == 0)))


def _add_kernel(total: Cost, instruction: Instruction, computation: Computation, chip: Chip | None) -> None:
    """Add a call of a custom kernel."""
    name = re.sub(r'[.\d]+$', '', instruction.name)
    if name.startswith(MEMORY_KERNELS):
        operands = [shape for operand in instruction.operands for shape in computation[operand].shapes]
        moved = sum(shape.bytes for shape in (*operands, *instruction.shapes))
        total.calibrated += 0.0 if chip is None else moved / (MEMORY_BUSY * chip.hbm_bytes / chip.clock)
        return
    products = next((count for start, count in ATTENTION_KERNELS.items() if name.startswith(start)), None)
    stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
    if products is not None:
        flops = products * _attention_product(instruction, computation)
    elif stated:
        flops = float(stated.group(1))
    else:
        total.unknown_kernels[name] += 1
        return
    calls, before = total.kernels.get(name, (0.0, 0.0))
    total.kernels[name] = calls + 1, before + flops


def _attention_product(instruction: Instruction, computation: Computation) -> float:
    """Return the FLOPs of one product of queries and keys in an attention kernel: [*, N, R, K] with [*, N, S, K].

    K is that of the values: dimensions of queries and keys that hide scores are no arithmetic of the model, and cost
    nothing where K fills only a part of a matrix unit.
    """
    operands = [shape for name in instruction.operands for shape in computation[name].shapes]
    query, _, value = [shape.dims for shape in operands if len(shape.dims) >= 3 and shape.dtype in ('bf16', 'f32')][:3]
    layouts = dict(re.findall(r'([qv])_layout\W+(\d)', instruction.attributes))
    transposed = lambda name: layouts.get(name) == '2'
    rows = query[-1] if transposed('q') else query[-2]
    keys, width = value[-2:][::-1] if transposed('v') else value[-2:]
    return 2.0 * math.prod(query[:-2]) * rows * keys * width


def collective_bytes(cost: Cost, mesh_shape: Mapping[str, int]) -> dict[tuple[str, str], float]:
    """Return (kind, mesh axes of its group) -> bytes received, for a program on a mesh."""
    totals: Counter[tuple[str, str]] = Counter()
    for (kind, group), size in cost.collectives.items():
        totals[kind, group_axes(group, mesh_shape)] += size  # pyright: ignore[reportArgumentType]
    return dict(totals)
