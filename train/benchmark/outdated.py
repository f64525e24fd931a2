"""What an evaluation reads, and which of its results are no longer of what is there now.

Every result in a seed's evaluation.json records its identity: the weights, how they are sampled, and the captions. A
training that was repeated after the evaluation, or whose evaluation was interrupted, is found by comparing the two.
What an older version did not record counts as unchanged; `adopt` records it before anything is trained again.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.json_file import read_json
from neodragon_jax.checkpoint.fingerprint import fingerprint
from train.benchmark.chain import AUTOENCODER, VAE, Chain
from train.benchmark.continuation import Continuation
from train.benchmark.cosine_term import CosineTerm
from train.benchmark.evidence import COMBINATIONS, DRAWN, SAMPLING, WEIGHTS
from train.benchmark.recovery import Recovery
from train.benchmark.systems import System, systems
from train.benchmark.tiers import Tier
from train.shapes.source import MovingShapesSource
from train.shapes.world import WORLDS

# Seed of the held-out scenes; training scenes have a different one.
SCENES_SEED = 1_000_003
# Weights of a result whose system was removed before they were recorded: those of no system.
UNKNOWN = 'unknown'

# Key of a result -> its value for what is there now.
Identity = Mapping[str, Any]


def held_out_scenes(tier: Tier) -> MovingShapesSource:
    """Return the scenes of a tier's evaluation, which are drawn when they are read."""
    size = (tier.height, tier.width)
    return MovingShapesSource(WORLDS[tier.world], tier.frames, size, SCENES_SEED, tier.captions, 'held_out', True)


def combinations_of(source: MovingShapesSource) -> list[int]:
    """Return the number of each clip's combination of attributes."""
    every = source.world.combinations('all')
    return [every.index(source.scene(index).traits) for index in range(len(source))]


def all_systems(chain: Chain) -> dict[str, System]:
    """Return every system of a seed by name, also those that are not trained yet; none of tier cosine."""
    if isinstance(chain, CosineTerm):
        return {}
    return chain.systems() if isinstance(chain, Recovery) else systems(chain)


def autoencoders(chain: Chain) -> dict[str, pathlib.Path]:
    """Return the video VAEs to evaluate, by name; a continuation trains none."""
    if isinstance(chain, Continuation):
        return {'small': chain.start / VAE}
    return {
        'native': chain.out / 'autoencoder' / 'result' / AUTOENCODER,
        'small': chain.out / 'decoder' / 'result' / VAE,
    }


def identities(chain: Chain) -> dict[str, Identity | None]:
    """Return the identity of everything that is evaluated, by the name of its results; None where a part is absent."""
    if isinstance(chain, CosineTerm):
        return {}
    captions = combinations_of(held_out_scenes(chain.tier))
    of = lambda weights, sampling='': {WEIGHTS: weights, SAMPLING: sampling, COMBINATIONS: captions}
    found: dict[str, Identity | None] = {DRAWN: of('')}
    for name, vae in autoencoders(chain).items():
        found[name] = of(fingerprint(vae)) if vae.is_dir() else None
    for name, system in all_systems(chain).items():
        identity = of(system.weights, system.sampling) if system.is_complete else None
        found |= dict.fromkeys((f'{name}/{first}' for first in chain.first_frames), identity)
    return found


def is_of(result: Mapping[str, Any], identity: Identity) -> bool:
    """Return whether a result is that of an identity; what an older version did not record counts as the same."""
    return all(result.get(key, value) == value for key, value in identity.items())


def read_results(chain: Chain) -> dict[str, Any]:
    """Return the results that a seed has so far."""
    path = chain.evaluation_file
    return read_json(path, dict[str, Any]) if path.is_file() else {}


def write_results(chain: Chain, results: Mapping[str, Any]) -> None:
    """Store the results of a seed."""
    with atomic_file(chain.evaluation_file) as path:
        path.write_text(json.dumps(results, indent=1) + '\n')


def due(wanted: Mapping[str, Identity | None], results: Mapping[str, Any]) -> list[str]:
    """Return what an evaluation has to do: names without a result, or with that of something else.

    Args:
      wanted: see `identities`; a result of something that is absent now cannot be compared, and stays.
    """
    return [
        name
        for name, identity in wanted.items()
        if name not in results or (identity is not None and not is_of(results[name], identity))
    ]


def adopt(chain: Chain) -> None:
    """Record the identity of results that an older version stored without it, as long as it can be told.

    A system that is not there is about to be trained: its result is not of the new one.
    """
    results = read_results(chain)
    old = [name for name, result in results.items() if not {WEIGHTS, SAMPLING} <= set(result)]
    if not old:
        return
    wanted = identities(chain)
    for name in (name for name in old if name in wanted):
        identity = wanted[name] or {WEIGHTS: UNKNOWN}
        results[name] = {key: value for key, value in identity.items() if key != COMBINATIONS} | results[name]
    write_results(chain, results)
