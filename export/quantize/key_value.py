"""Choice of the bits of keys and values: 8 where the target allows it, else 16 with the measured reason in recipe.json.

The HTP treats the second operand of a matrix product as a weight: its native type has 8 bits, and 16 bits are slower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

NATIVE_BITS, WIDE_BITS = 8, 16
# Ratios are measured on validation prompts, which did not determine the ranges. Other prompts may reach lower ones: a
# search aims this far above the target.
MARGIN_DB = 3.0
RECIPE = 'recipe.json'
# Where 8 bits miss the target, 16 bits are used only if they gain at least this much.
GAIN_DB = 0.5


@dataclasses.dataclass(frozen=True)
class KeyValueBits:
    """The chosen bits of keys and values in a graph, with the measured reasons.

    Attributes:
      bits: NATIVE_BITS or WIDE_BITS.
      reached_db: lowest ratio over the calls, by number of bits tried.
      aim_db: requested ratio.
    """

    bits: int
    reached_db: Mapping[int, float]
    aim_db: float

    @property
    def db(self) -> float:
        """Lowest ratio with the chosen bits."""
        return self.reached_db[self.bits]

    def recipe(self) -> dict[str, Any]:
        """Return the entry of recipe.json."""
        if len(self.reached_db) == 1:
            reason = f'{NATIVE_BITS} bits reach {self.db:.1f} dB; {self.aim_db:.1f} are asked for'
        else:
            native_db = self.reached_db[NATIVE_BITS]
            gain = self.reached_db[WIDE_BITS] - native_db
            reason = f'{NATIVE_BITS} bits reach {native_db:.1f} dB of {self.aim_db:.1f}; {WIDE_BITS} gain {gain:.1f} dB'
        reached = {str(bits): ratio for bits, ratio in self.reached_db.items()}
        return {'key_value_bits': self.bits, 'key_value_db': reached, 'key_value_reason': reason}


def choose_bits(write: Callable[[int], float], aim_db: float) -> KeyValueBits:
    """Write a graph with the fewest bits of keys and values that reach a ratio.

    Args:
      write: writes the graph with a number of bits and returns its lowest ratio in dB; the last call is the result.
      aim_db: requested ratio.
    """
    reached = {NATIVE_BITS: write(NATIVE_BITS)}
    if reached[NATIVE_BITS] >= aim_db:
        return KeyValueBits(NATIVE_BITS, reached, aim_db)
    reached[WIDE_BITS] = write(WIDE_BITS)
    if reached[WIDE_BITS] - reached[NATIVE_BITS] >= GAIN_DB:
        return KeyValueBits(WIDE_BITS, reached, aim_db)
    write(NATIVE_BITS)
    return KeyValueBits(NATIVE_BITS, reached, aim_db)
