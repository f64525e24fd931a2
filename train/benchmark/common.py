"""What a report can compare: the systems that are evaluated in every seed, as they are there now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from neodragon_jax.checkpoint.folders import STUDENT
from train.benchmark import outdated
from train.benchmark.chain import Chain
from train.benchmark.evidence import COMBINATIONS, DRAWN, Evaluated, Evidence


def common(chains: Sequence[Chain], seen: Sequence[Evidence]) -> tuple[list[Evidence], dict[str, str]]:
    """Return the evidence of what all seeds have, and what is left out: system -> why, such as 'not trained in seed 1'.

    A system is left out with first frames of both kinds; a result that only older versions had, alone.

    Args:
      seen: of each chain.
    """
    wanted = [outdated.identities(chain) for chain in chains]
    captions = _captions(seen)
    reasons: dict[str, dict[str, dict[int, None]]] = {}
    for name in dict.fromkeys(name for one in (*(one.results for one in seen), *wanted) for name in one):
        title = _system(name) if name in wanted[0] else name
        for chain, evidence, identities in zip(chains, seen, wanted, strict=True):
            if why := _fault(chain, evidence.results.get(name), identities.get(name), name, captions):
                reasons.setdefault(title, {}).setdefault(why, {})[chain.seed] = None
    shown = [name for name in seen[0].results if not {name, _system(name)} & set(reasons)]
    cut = [one._replace(results=Evaluated({name: one.results[name] for name in shown})) for one in seen]
    return cut, {title: ', '.join(_in_seeds(*one) for one in found.items()) for title, found in reasons.items()}


def _captions(seen: Sequence[Evidence]) -> Any:
    """Return the combination of each clip in the first seed that knows them; None in the oldest results."""
    drawn = (one.results.get(DRAWN, {}) for one in seen)
    return next((one[COMBINATIONS] for one in drawn if COMBINATIONS in one), None)


def _fault(
    chain: Chain,
    result: Mapping[str, Any] | None,
    identity: outdated.Identity | None,
    name: str,
    captions: Any,
) -> str | None:
    """Return why a seed has no valid result of a name; None if it has one."""
    if result is None:
        system = _system(name)
        is_trained = system not in chain.students or (chain.result(system) / STUDENT).is_dir()
        return 'not evaluated' if is_trained else 'not trained'
    if captions is not None and not np.array_equal(result.get(COMBINATIONS, captions), captions):
        return 'evaluated on other captions'
    # Captions of an older version are as good, if all results have them.
    made = {key: value for key, value in (identity or {}).items() if key != COMBINATIONS}
    return None if outdated.is_of(result, made) else 'changed after its evaluation'


def _in_seeds(why: str, seeds: Iterable[int]) -> str:
    return f'{why} in seed {" and ".join(map(str, seeds))}'


def _system(name: str) -> str:
    """Return the system of a result, which names its first frame, too."""
    return name.partition('/')[0]
