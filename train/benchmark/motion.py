"""The motion of systems in a world whose captions omit it: results of clips, targets, and a table of the report.

Legend: N clips, F frames, H W pixels, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from train.benchmark.evidence import CLIPS, DRAWN, GENERATED, Evidence, Target, Value, captions_of
from train.benchmark.figures import Curves
from train.shapes.motion import motion_of, spread, variety
from train.shapes.world import World

UNIT, HEADINGS = 'unit', ('heading_x', 'heading_y')


def motion_columns(videos: UInt8[np.ndarray, 'N F H W 3'], world: World) -> dict[str, list[float]]:
    """Return the displacement of every unit, as `unit1` and so on, and the heading, of each clip."""
    seen = [motion_of(video, world.steady) for video in videos]
    ways, headings = np.stack([one.displacement for one in seen]), np.stack([one.heading for one in seen])
    columns = {f'{UNIT}{number}': ways[:, number - 1].tolist() for number in range(1, ways.shape[1] + 1)}
    return columns | {name: headings[:, axis].tolist() for axis, name in enumerate(HEADINGS)}


def motion_kept(evidence: Evidence, system: str, units: Sequence[int]) -> float:
    """Return the mean displacement of a system in some units, over that of the drawn clips."""
    mean = lambda results: float(np.mean([results[f'{UNIT}{unit}'][0] for unit in units]))
    return mean(evidence.results[system]) / mean(evidence.results[DRAWN])


def variety_of(evidence: Evidence, system: str, world: World) -> float:
    """Return the variety of direction of a system's clips of one caption, see `shapes.motion`."""
    return variety(*_headings(evidence, system, world))


def spread_of(evidence: Evidence, system: str, world: World, units: int) -> float:
    """Return the spread of displacement before the turn over that of the drawn clips, see `shapes.motion`."""

    def of(name: str) -> float:
        headings, captions = _headings(evidence, name, world)
        clips: Any = evidence.results[name][CLIPS]
        before = range(1, int(units * world.steady) + 1)
        lengths = np.sum([clips[f'{UNIT}{unit}'] for unit in before], axis=0)
        return spread(headings * lengths[:, None], captions)

    return of(system) / of(DRAWN)


def _headings(evidence: Evidence, system: str, world: World) -> tuple[np.ndarray, list[Any]]:
    """Return heading [N, 2] and caption of each clip of a system."""
    results: Any = evidence.results[system]
    headings = np.stack([results[CLIPS][name] for name in HEADINGS], axis=1)
    return headings, captions_of(evidence, world)


def late_units(units: int) -> range:
    """Return the last quarter of the units, which lie after the turn of a world with one."""
    return range(units - units // 4 + 1, units + 1)


def motion_targets(world: World, units: int, students: Sequence[str], teacher: str) -> list[Target]:
    """Return the targets of a world whose captions omit the direction.

    Args:
      units: U, generated units > 0 of a clip.
      teacher: name of the system that the students learn from.
    """
    late = late_units(units)

    def kept(system: str) -> Value:
        return lambda seen, first: motion_kept(seen, f'{system}/{first}', late)

    def relative_variety(system: str) -> Value:
        return lambda seen, first: (
            variety_of(seen, f'{system}/{first}', world) / variety_of(seen, f'{teacher}/{first}', world)
        )

    least = {'own_history': 0.9}
    varied: dict[str, tuple[float | None, float | None]] = {
        'matching': (0.8, None),
        'student': (0.8, None),
        'regression': (None, 0.5),
    }
    shown = (teacher, *students)
    made = [
        Target(f'{name}: motion kept in the last units, 1 as drawn', _generated(kept(name)), least.get(name))
        for name in shown
    ]
    return made + [
        Target(f"{name}: variety of direction over its teacher's", _generated(relative_variety(name)), *bounds)
        for name, bounds in varied.items()
        if name in shown
    ]


def _generated(value: Value) -> Any:
    """Return the number for videos from nothing."""
    return lambda seen: value(seen, GENERATED)


def motion_table(seen: Sequence[Evidence], estimate: Any, world: World, units: int) -> list[str]:
    """Return the report's section: displacement by unit over the drawn clips', variety and spread.

    Args:
      estimate: function from a number of the evidence to its mean and error, see `statistics.Estimator`.
    """
    names = ('system', *map(str, range(1, units + 1)), 'variety', 'spread')
    lines = ['## Motion by unit, 1 as drawn', '', f'| {" | ".join(names)} |', f'|---{"|---:" * (units + 2)}|']
    for system in _shown(seen):
        cells = _by_unit(estimate, system, units)
        cells.append(estimate(lambda one, s=system: variety_of(one, s, world)))
        cells.append(estimate(lambda one, s=system: spread_of(one, s, world, units)))
        lines.append(f'| {system} | {" | ".join(map(str, cells))} |')
    return [*lines, '']


def motion_curves(seen: Sequence[Evidence], estimate: Any, units: int) -> Curves:
    """Return the displacement of every system by unit, 1 as drawn.

    Args:
      estimate: as in `motion_table`.
    """
    series = {name.removesuffix(f'/{GENERATED}'): _by_unit(estimate, name, units) for name in _shown(seen)}
    return Curves(range(1, units + 1), 'unit', {'displacement, 1 as drawn': series})


def _shown(seen: Sequence[Evidence]) -> list[str]:
    """Return the names of the drawn clips and of all videos from nothing."""
    return [name for name in seen[0].results if name == DRAWN or name.endswith(f'/{GENERATED}')]


def _by_unit(estimate: Any, system: str, units: int) -> list[Any]:
    """Return the displacement of a system in each unit, 1 as drawn."""
    return [estimate(lambda one, u=unit: motion_kept(one, system, [u])) for unit in range(1, units + 1)]
