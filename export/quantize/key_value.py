"""Bits of keys and values: 8 where the target allows it, else 16 with the measured reason in recipe.json.

The HTP takes the second operand of a matrix product for a weight: 8 bits are its native type, and 16 bits cost time. In
a stage of the denoiser on a Snapdragon 8 Elite they took 18.6% longer and gained 0.01 dB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

FEW, MANY = 8, 16
# A search aims this much above the target, because other inputs than the calibration calls come out worse.
HEADROOM_DB = 3.0
RECIPE = 'recipe.json'
# 16 bits must gain this much to be worth their time where 8 bits miss the target.
GAIN_DB = 0.5


@dataclasses.dataclass(frozen=True)
class KeyValueBits:
    """The bits of keys and values in a graph, and why.

    Attributes:
      bits: FEW or MANY.
      reached_db: lowest ratio over the judging calls at each number of bits that was tried.
      aim_db: ratio that was asked for.
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
            reason = f'{FEW} bits reach {self.db:.1f} dB; {self.aim_db:.1f} are asked for'
        else:
            gain = self.reached_db[MANY] - self.reached_db[FEW]
            reason = f'{FEW} bits reach {self.reached_db[FEW]:.1f} dB of {self.aim_db:.1f}; {MANY} gain {gain:.1f} dB'
        reached = {str(bits): ratio for bits, ratio in self.reached_db.items()}
        return {'key_value_bits': self.bits, 'key_value_db': reached, 'key_value_reason': reason}


def choose_bits(write: Callable[[int], float], aim_db: float) -> KeyValueBits:
    """Write a graph with as few bits of keys and values as reach a ratio.

    Args:
      write: writes the graph with a number of bits and returns its lowest ratio in dB. The last call leaves the result.
    """
    reached = {FEW: write(FEW)}
    if reached[FEW] >= aim_db:
        return KeyValueBits(FEW, reached, aim_db)
    reached[MANY] = write(MANY)
    if reached[MANY] - reached[FEW] >= GAIN_DB:
        return KeyValueBits(MANY, reached, aim_db)
    write(FEW)
    return KeyValueBits(FEW, reached, aim_db)
