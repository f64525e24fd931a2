"""TPU slices by name: peak rates, memory and wiring of the chips, and their compile-time topologies.

Peak rates, memory and link rates are those of Google's Cloud TPU documentation ("System architecture" of each
generation). Usable memory is the compiler's own limit. A device is a JAX device: one chip, except on tpu7x, where each
of the two cores is a device.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from neodragon_jax.base.errors import InputError, did_you_mean
from train.runtime.peaks import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Attributes:
      peak_flops: FLOP/s of a device in bfloat16.
      flops_per_cycle: FLOPs per cycle of all matrix units of a device; `peak_flops` divided by it is the clock.
      matrix_unit: rows and columns of one matrix unit.
      hbm_bytes: bytes per second of a device's memory.
      hbm_gib: GiB that a program may use on a device.
      link_bytes: bytes per second, one way, of one link of a device.
      dcn_bytes: bytes per second, one way, of a device's share of its host's network cards, which join slices.
      attention: share of the peak rate that the attention kernel reaches by the compiler's schedule at head dimension
        64, forward and backward: 2 and 5 products of a tile of 896 rows and 1,792 keys / instructions of its schedule.
        Measured for v5e and v6e (`train.measure.kernel`); the others are taken to be like the one with the same matrix
        unit.
      grid_axes: dimensions of the interconnect grid: 2 or 3.
      wrap: an axis of the slice closes to a ring when its length is a multiple of this (3 axes: when all are).
      topologies: shapes that Google Cloud offers.
      options: arguments of `get_topology_desc` other than the name.
      devices: number of devices of one chip.
    """

    peak_flops: float
    flops_per_cycle: int
    matrix_unit: int
    hbm_bytes: float
    hbm_gib: float
    link_bytes: float
    dcn_bytes: float
    attention: tuple[float, float]
    grid_axes: int
    wrap: int
    topologies: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()
    devices: int = 1

    @property
    def clock(self) -> float:
        """Return the cycles per second."""
        return self.peak_flops / self.flops_per_cycle


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16')
# Kernels at head dimension 64, which fills a half or a quarter of a matrix unit.
_HALF, _QUARTER = (0.393, 0.467), (0.152, 0.213)
_MEGACORE = (('chip_config_name', 'megacore'),)

# The matrix units of v6e and tpu7x are 256 x 256; the compiler's estimates for them exceed what two units could do in a
# cycle, so four of them are assumed, which puts the clocks at 1.75 and 2.2 GHz.
CHIPS = {
    'v4': Chip(PEAK_FLOPS['v4'], 8 * 2 * 128**2, 128, 1228e9, 30.75, 50e9, 6.25e9, _HALF, 3, 4, _CUBES, _MEGACORE),
    'v5e': Chip(PEAK_FLOPS['v5e'], 4 * 2 * 128**2, 128, 819e9, 15.75, 50e9, 3.125e9, _HALF, 2, 16, _FLAT),
    'v5p': Chip(PEAK_FLOPS['v5p'], 8 * 2 * 128**2, 128, 2765e9, 95.74, 100e9, 6.25e9, _HALF, 3, 4, _CUBES),
    'v6e': Chip(PEAK_FLOPS['v6e'], 4 * 2 * 256**2, 256, 1640e9, 31.25, 100e9, 12.5e9, _QUARTER, 2, 16, _FLAT),
    'tpu7x': Chip(
        PEAK_FLOPS['tpu7x'], 4 * 2 * 256**2, 256, 3690e9, 94.75, 50e9, 6.25e9, _QUARTER, 3, 4, _CUBES, devices=2
    ),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices of a name such as v5e:4x4, joined by the data center's network.

    Attributes:
      shape: chips of one slice along each axis.
      slices: number of slices.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f'{self.slices} x {self.name}'

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    def compile_devices(self) -> Sequence[Any]:
        """Return the devices that stand for the slice at compile time.

        Raises:
          InputError: libtpu is not installed.
        """
        require_compiler()
        return topologies.get_topology_desc(self.name, platform='tpu', **self.options()).devices

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `jax.experimental.topologies.get_topology_desc`."""
        single = {'chips_per_host_bounds': (1, 1, 1)} if math.prod(self.shape) == 1 else {}
        several = {'num_slices': self.slices} if self.slices > 1 else {}
        return dict(self.chip.options) | single | several

    def bandwidth(self, places: Sequence[Sequence[int]]) -> float:
        """Return the bytes per second that the worst-placed device of a group can receive from the others.

        Along each axis of the slice over which the group extends, a device has two links if the axis is a ring that
        the group fills. Otherwise it has one, like a device at an end.

        Args:
          places: grid coordinates of the group's devices, all in one slice.
        """
        rings = [length % self.chip.wrap == 0 for length in self.shape]
        if self.chip.grid_axes == 3:
            rings = [all(rings)] * 3
        links = 0
        for axis, length in enumerate(self.shape):
            extent = len({place[axis] for place in places})
            if extent > 1:
                links += 2 if rings[axis] and extent == length else 1
        # Two cores of one chip exchange data faster than any link, so they count as one device.
        return max(links, 1) * self.chip.link_bytes


def require_compiler() -> None:
    """Raise InputError unless libtpu, which contains the TPU compiler, is installed."""
    if importlib.util.find_spec('libtpu') is None:
        raise InputError("libtpu, the TPU compiler, is not installed; run: pip install -e '.[tpu]'")


def known_topologies() -> list[str]:
    """Return the names of all slices."""
    return [f'{name}:{shape}' for name, chip in CHIPS.items() for shape in chip.topologies]


def topology(name: str, slices: int = 1) -> Topology:
    """Return slices by their name.

    Raises:
      InputError: there is no such slice.
    """
    known = known_topologies()
    if name not in known:
        listed = '; '.join(f'{kind}: {" ".join(chip.topologies)}' for kind, chip in CHIPS.items())
        raise InputError(
            f'--topology={name}: no such slice.{did_you_mean(name, known)} Write CHIP:SHAPE with one of {listed}.'
        )
    if slices < 1:
        raise InputError(f'--num-slices={slices}: give 1 or more.')
    kind, _, shape = name.partition(':')
    return Topology(name, CHIPS[kind], tuple(map(int, shape.split('x'))), slices)
