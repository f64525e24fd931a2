"""Collectives of a compiled program: bytes received by kind, and transfers between slices."""

from __future__ import annotations

import re
from typing import NamedTuple

from train.aot.hlo import Instruction, integers

# Kind of collective -> bytes received per byte of one device's input, in a group of n.
COLLECTIVES = {
    'all-gather': lambda n: n - 1,
    'reduce-scatter': lambda n: (n - 1) / n,
    'all-reduce': lambda n: 2 * (n - 1) / n,
    'all-to-all': lambda n: (n - 1) / n,
    'ragged-all-to-all': lambda n: (n - 1) / n,
    'collective-permute': lambda n: 1,
    'collective-broadcast': lambda n: 1,
}


class Transfer(NamedTuple):
    """A transfer between slices, which the TPU compiler splits from the collective inside each slice.

    Attributes:
      kind: kind of the collective.
      slices: slices that take part.
      bytes: bytes that a device receives.
      cycles: cycles of the operations scheduled between its start and its end, which can hide it.
    """

    kind: str
    slices: int
    bytes: float
    cycles: float


def transfer_of(send: Instruction, sent: float, cycles: float) -> Transfer:
    """Return the transfer that a `send` of the TPU compiler begins.

    Args:
      sent: bytes of a device's input.
      cycles: cycles of the operations until its end.
    Raises:
      ValueError: its kind is unknown.
    """
    kind, slices = _kind(send.attributes)
    return Transfer(kind, slices, COLLECTIVES[kind](slices) * sent, cycles)


def _kind(attributes: str) -> tuple[str, int]:
    """Return the kind of a transfer between slices, and the number of slices that exchange data."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', attributes)
    name = kind.group(1).lower().replace('_', '-') if kind else ''
    if name not in COLLECTIVES or target is None:
        raise ValueError(f'unknown transfer between slices: {attributes[:300]}')
    ends = [integers(part.replace(':', ',')) for part in target.group(1).split(',')]
    return name, sum(end[-1] - end[0] + 1 for end in ends)
