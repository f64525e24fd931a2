"""Report of a sizing, as text and table rows: memory against capacity, step time and utilization.

The times are estimates. `train.measure.published_steps` compares them with published steps.

  compute        calibrated cycles / clock: matrix products at the compiler's cycles, operations bound by memory by
                 their bytes (`train.aot.cost`); excludes collectives and custom kernels
  kernels        FLOPs of custom kernels / (efficiency x peak); the efficiency is that of the compiler's schedule of the
                 attention kernel (`train.aot.chips`), without the overhead of starting a tile
  communication  for each collective, bytes that a device receives / rate of the links of its group; between slices, /
                 its share of the network cards of its host
  exposed        the time between slices that the operations scheduled meanwhile do not hide; more is exposed if
                 transfers queue
  optimistic     max(compute + kernels, communication inside a slice) + exposed: all other communication is hidden
  pessimistic    compute + kernels + communication: no overlap
  MFU            model FLOPs / (step time x peak); model FLOPs exclude recomputation and the
                 padding of kernels
  unused         shares of the model FLOPs that are padding of short histories, and scores of tokens that may not see
                 each other (`train.flow.unused`)
  run            chip-hours of as many samples as the settings train on, if every step took as long as this one
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from train.aot.chips import Topology
from train.flow.unused import Unused

GIB, DAY = 2**30, 86400.0
WAY_OUT = 'try a smaller batch, remat full, or more devices along fsdp'
# Prefix of the names of attention kernels that run backward.
BACKWARD = ('splash_mha_dkv', 'splash_mha_dq')


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts from one compilation; bytes, FLOPs and cycles are per device and step.

    Attributes:
      fits: False when the compiler ran out of memory, or the program that it made needs more than the device has.
      memory: bytes of arguments, output, alias (output that lives in arguments), temporaries and code.
      needed_bytes: total memory.
      flops: executed FLOPs of matrix products, without custom kernels.
      cycles, calibrated_cycles: by the compiler, and corrected; see `train.aot.cost`.
      xla_flops: FLOPs of XLA's own cost analysis, which counts loop bodies once; for comparison.
      collectives: [kind, mesh axes, bytes received, seconds].
      between_slices: [kind, slices, bytes received, seconds, exposed seconds].
      kernels: custom kernel -> [calls, FLOPs].
      unknown: loops and kernels whose cost is unknown.
    """

    fits: bool
    needed_bytes: float
    lower_s: float
    compile_s: float
    compile_cpu_s: float = 0.0
    compile_rss_bytes: float = 0.0
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    xla_flops: float = 0.0
    cycles: float = 0.0
    calibrated_cycles: float = 0.0
    collectives: list[tuple[str, str, float, float]] = dataclasses.field(default_factory=list)
    between_slices: list[tuple[str, int, float, float, float]] = dataclasses.field(default_factory=list)
    kernels: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)
    message: str = ''

    @property
    def compiled(self) -> bool:
        """Return whether the compiler made a program; else only `needed_bytes`, `compile_s` and `lower_s` are known."""
        return bool(self.memory)


@dataclasses.dataclass(frozen=True)
class Case:
    """A compiled step of a program with its settings.

    Attributes:
      share: fraction of the steps that are of this variant.
      batch_size: samples of one batch.
      samples: samples read in a step: several batches where a program makes several updates.
      model_flops: model FLOPs of a whole step on all devices.
      run_samples: samples that a run of the settings trains on; 0 if unknown.
      unused: shares of the model FLOPs that no result depends on; None if unknown.
    """

    program: str
    variant: str
    share: float
    topology: Topology
    mesh: tuple[int, ...]
    batch_size: int
    samples: int
    options: dict[str, str]
    model_flops: float
    run_samples: int = 0
    unused: Unused | None = None

    @property
    def devices(self) -> int:
        return int(self.mesh[0] * self.mesh[1] * self.mesh[2])

    @property
    def per_device(self) -> float:
        """Return the samples of one batch per device; devices along the tensor axis share their samples."""
        return self.batch_size / (self.mesh[0] * self.mesh[1])


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step and the rates derived from them; pairs are (optimistic, pessimistic)."""

    compute_s: float
    kernels_s: float
    communication_s: float
    between_slices_s: float
    exposed_s: float
    efficiency: tuple[float, float]
    step_s: tuple[float, float]
    mfu: tuple[float, float]
    samples_per_s: tuple[float, float]

    @property
    def communication_share(self) -> float:
        """Communication / step time, if nothing hides."""
        return (self.communication_s + self.between_slices_s) / self.step_s[1]

    def chip_hours(self, case: Case) -> tuple[float, float]:
        """Return the chip-hours of a run with this step."""
        least, most = (case.run_samples / rate * case.topology.chips / 3600 for rate in self.samples_per_s)
        return least, most


def estimate(case: Case, facts: Facts, attention: tuple[float, float] | None = None) -> Estimate:
    """Return the estimate for a step that fits in memory.

    Args:
      attention: share of the peak rate that attention kernels reach, forward and backward; None is that of the chip.
    """
    chip = case.topology.chip
    efficiency = attention or chip.attention
    compute = facts.calibrated_cycles / chip.clock
    kernels = sum(
        flops / (efficiency[name.startswith(BACKWARD)] * chip.peak_flops) for name, (_, flops) in facts.kernels.items()
    )
    communication = sum(seconds for *_, seconds in facts.collectives)
    between = sum(seconds for *_, seconds, _ in facts.between_slices)
    exposed = sum(seconds for *_, seconds in facts.between_slices)
    step = max(compute + kernels, communication) + exposed, compute + kernels + communication + between
    peak = case.devices * chip.peak_flops
    return Estimate(
        compute_s=compute,
        kernels_s=kernels,
        communication_s=communication,
        between_slices_s=between,
        exposed_s=exposed,
        efficiency=efficiency,
        step_s=step,
        mfu=(case.model_flops / (step[0] * peak), case.model_flops / (step[1] * peak)),
        samples_per_s=(case.samples / step[0], case.samples / step[1]),
    )


def needed_bytes(message: str) -> tuple[float, float] | None:
    """Return (bytes needed, bytes available) from the compiler's out-of-memory message; None for any other message."""
    if 'RESOURCE_EXHAUSTED' not in message:
        return None
    units = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
    patterns = (
        r'Used ([\d.]+)([KMGT]?)\w* of ([\d.]+)([KMGT]?)\w* hbm',
        r'\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)',
    )
    for pattern in patterns:
        if match := re.search(pattern, message):
            needed, unit, there, unit_there = match.groups()
            return float(needed) * units[unit], float(there) * units[unit_there]
    return None


def text(case: Case, facts: Facts) -> str:
    """Return the report of one case."""
    chip = case.topology.chip
    settings = ''.join(f', {name} {value}' for name, value in case.options.items())
    head = (
        f'{case.program}, variant {case.variant} ({case.share:.0%} of the steps), on {case.topology}: '
        f'{case.devices} devices, mesh {"x".join(map(str, case.mesh))} (data x fsdp x tensor)\n'
        f'batch {case.batch_size} ({case.per_device:g} per device), {case.samples} samples per step{settings}'
    )
    host = (
        f'host       lowering {facts.lower_s:.0f} s, compiling {facts.compile_s:.0f} s '
        f'({facts.compile_cpu_s:.0f} s of CPU, {facts.compile_rss_bytes / GIB:.1f} GiB)'
    )
    lines = [head]
    if not facts.fits:
        lines.append(f'memory     does not fit: {needs(facts, chip.hbm_gib)}; {WAY_OUT}')
    if not facts.compiled:
        return '\n'.join([*lines, host])
    times = estimate(case, facts)
    lines += [_memory_line(facts, chip.hbm_gib), *_work_lines(case, facts, times)]
    for kind, axes, size, seconds in sorted(facts.collectives, key=lambda row: -row[2]):
        lines.append(f'           {kind:18} over {axes or "-":16} {size / 1e9:10.3f} GB {seconds * 1e3:10.2f} ms')
    for kind, slices, size, seconds, exposed in facts.between_slices:
        lines.append(
            f'           {kind:18} over {f"{slices} slices":16} {size / 1e9:10.3f} GB {seconds * 1e3:10.2f} ms, '
            f'{exposed * 1e3:.2f} ms exposed'
        )
    lines += [*_time_lines(case, times), host]
    lines += [f'not counted: {name}' for name in facts.unknown]
    return '\n'.join(lines)


def needs(facts: Facts, capacity_gib: float) -> str:
    """Return the words on the memory of a program that does not fit."""
    if not facts.needed_bytes:
        return f'more than {capacity_gib:.2f} GiB'
    return f'needs {facts.needed_bytes / GIB:.2f} of {capacity_gib:.2f} GiB'


def _memory_line(facts: Facts, capacity_gib: float) -> str:
    parts = ', '.join(f'{name} {size / GIB:.2f}' for name, size in facts.memory.items())
    return (
        f'memory     {facts.needed_bytes / GIB:.2f} of {capacity_gib:.2f} GiB per device '
        f'({facts.needed_bytes / GIB / capacity_gib:.0%}): {parts}'
    )


def _work_lines(case: Case, facts: Facts, times: Estimate) -> list[str]:
    kernel_flops = sum(flops for _, flops in facts.kernels.values())
    executed, model = facts.flops + kernel_flops, case.model_flops / case.devices
    lines = [
        f'arithmetic {executed / 1e12:.3f} TFLOP executed per device, {model / 1e12:.3f} of the model '
        f"({executed / model:.2f} times); XLA's own figure: {facts.xla_flops / 1e12:.3f}",
        f'cycles     {facts.cycles / 1e6:.1f} million by the compiler, {facts.calibrated_cycles / 1e6:.1f} calibrated, '
        f'at {case.topology.chip.clock / 1e9:.2f} GHz',
    ]
    for name, (calls, flops) in facts.kernels.items():
        lines.append(
            f'kernel     {name}: {calls:.0f} calls, {flops / 1e12:.3f} TFLOP; assumed efficiency '
            f'{times.efficiency[name.startswith(BACKWARD)]:.1%}'
        )
    total = sum(size for _, _, size, _ in facts.collectives)
    between = sum(size for _, _, size, _, _ in facts.between_slices)
    apart = f', and {between / 1e9:.3f} GB from other slices' if case.topology.slices > 1 else ''
    if case.unused is not None:
        lines.append(
            f'unused     {case.unused.padding:.1%} of the model FLOPs are padding of short histories, '
            f'{case.unused.masked:.1%} masked scores'
        )
    return [*lines, f'network    {total / 1e9:.3f} GB received per device and step{apart}']


def _time_lines(case: Case, times: Estimate) -> list[str]:
    rate = ' to '.join(f'{value:.2f}' for value in reversed(times.samples_per_s))
    per_day = ' to '.join(f'{value * DAY:,.0f}' for value in reversed(times.samples_per_s))
    lines = [
        f'time       compute {times.compute_s:.3f} s, kernels {times.kernels_s:.3f} s, '
        f'communication {times.communication_s:.3f} s'
        + (f', between slices {times.between_slices_s:.3f} s' if times.between_slices_s else ''),
        f'step       {times.step_s[0]:.3f} s if communication hides, {times.step_s[1]:.3f} s if it does not '
        f'({times.communication_share:.0%} communication)',
        f'MFU        at most {times.mfu[0]:.1%}, {times.mfu[1]:.1%} if nothing hides',
        f'rate       {rate} samples/s, {per_day} samples/day',
    ]
    if case.run_samples:
        hours = ' to '.join(f'{value:.1f}' for value in times.chip_hours(case))
        lines.append(f'run        {hours} chip-hours for the {case.run_samples:,} samples of the settings')
    return lines


COLUMNS = (
    'topology', 'mesh', 'variant', 'batch per device', 'options', 'GiB', 'TFLOP executed / model', 'GB received',
    'communication %', 'step s', 'MFU %', 'samples/s', 'samples/day', 'chip-hours of a run', 'compile s',
)  # fmt: skip


def row(case: Case, facts: Facts) -> list[str]:
    """Return the cells of a table's row, see COLUMNS."""
    chip = case.topology.chip
    cells = [
        str(case.topology),
        'x'.join(map(str, case.mesh)),
        case.variant,
        f'{case.per_device:g}',
        ' '.join(case.options.values()),
    ]
    if not facts.fits:
        return [*cells, f'does not fit: {needs(facts, chip.hbm_gib)}', *[''] * 8, f'{facts.compile_s:.0f}']
    times = estimate(case, facts)
    executed = facts.flops + sum(flops for _, flops in facts.kernels.values())
    return [
        *cells,
        f'{facts.needed_bytes / GIB:.1f} of {chip.hbm_gib:.1f}',
        f'{executed / 1e12:.1f} / {case.model_flops / case.devices / 1e12:.1f}',
        f'{sum(row[2] for row in (*facts.collectives, *facts.between_slices)) / 1e9:.1f}',
        f'{100 * times.communication_share:.0f}',
        f'{times.step_s[0]:.2f}-{times.step_s[1]:.2f}',
        f'{100 * times.mfu[0]:.0f}-{100 * times.mfu[1]:.0f}',
        f'{times.samples_per_s[1]:.1f}-{times.samples_per_s[0]:.1f}',
        f'{DAY * times.samples_per_s[1]:,.0f}-{DAY * times.samples_per_s[0]:,.0f}',
        '-'.join(f'{hours:.1f}' for hours in times.chip_hours(case)),
        f'{facts.compile_s:.0f}',
    ]


def best(cases: list[tuple[Case, Facts]]) -> set[int]:
    """Return for each slice the index of the case with the most samples per second by the pessimistic estimate."""
    chosen: dict[str, tuple[float, int]] = {}
    for place, (case, facts) in enumerate(cases):
        if facts.fits:
            rate = estimate(case, facts).samples_per_s[1]
            chosen[str(case.topology)] = max(chosen.get(str(case.topology), (0.0, 0)), (rate, place))
    return {place for _, place in chosen.values()}


def table(cases: list[tuple[Case, Facts]]) -> str:
    """Return a Markdown table; the best row of every slice is bold."""
    rows, chosen = [row(case, facts) for case, facts in cases], best(cases)
    lines = ['| ' + ' | '.join(COLUMNS) + ' |', '|' + '---|' * len(COLUMNS)]
    for place, cells in enumerate(rows):
        marked = [f'**{cell}**' if cell else '' for cell in cells] if place in chosen and len(rows) > 1 else cells
        lines.append('| ' + ' | '.join(marked) + ' |')
    return '\n'.join(lines)


def to_json(case: Case, facts: Facts) -> dict[str, Any]:
    """Return a case, its facts and its estimate as JSON."""
    described = dataclasses.asdict(case) | {'topology': str(case.topology)}
    times = dataclasses.asdict(estimate(case, facts)) if facts.fits else None
    return {'case': described, 'facts': dataclasses.asdict(facts), 'estimate': times}
