"""Search for the weights in two parts: few where they reach the target, short where none do."""

from __future__ import annotations

import math

from export.quantize.rounding_noise import Group
from export.quantize.two_parts import Doubling, double

SIGNAL = 1e6
GROUPS = [Group((f'weight{index}',), 100, 2.0**-index * 1000) for index in range(8)]


def search(aim_db: float, other_noise: float, correlation: float = 1.0) -> tuple[Doubling, list[int]]:
    """Search where every undoubled group adds its noise times `correlation`; return the result and all trials."""
    trials = []

    def ratio_db(count: int) -> float:
        noise = other_noise + correlation * sum(group.noise for group in GROUPS[count:])
        return 10 * math.log10(SIGNAL / noise)

    def doubled_db(names: list[str]) -> float:
        trials.append(len(names))
        assert names == [name for group in GROUPS[: len(names)] for name in group.names]
        return ratio_db(len(names))

    return double(GROUPS[::-1], ratio_db(0), SIGNAL, aim_db, doubled_db), trials


def test_the_fewest_groups_that_the_noise_asks_for():
    result, trials = search(aim_db=36.0, other_noise=0.0)
    assert result.reached_db >= 36.0 and result.count == 3 and trials == [3]


def test_an_aim_that_no_selection_reaches_ends_after_the_bound():
    """Other noise alone is above the aim: one trial shows it, one measures the bound, and no third is made."""
    result, trials = search(aim_db=36.0, other_noise=400.0)
    assert trials == [3, 8] and result.count == 8
    assert result.reached_db == 10 * math.log10(SIGNAL / 400.0) < 36.0


def test_a_bound_above_the_aim_does_not_end_the_search():
    """Errors that add up to more than their sum look like other noise; fewer than all groups still suffice."""
    result, trials = search(aim_db=36.0, other_noise=1e-3, correlation=3.0)
    assert trials[1] == 8 and result.reached_db >= 36.0 and 3 < result.count < 8
    assert trials[-1] == result.count, 'the graph on disk is the chosen one'
