"""Captions of moving shapes: their wordings, and the attributes of a caption in any wording."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from neodragon_jax.base.errors import InputError
from train.shapes.world import COLORS, DIRECTIONS, REACHES, SIZES, SPEEDS, Traits

# Other words for the same, the canonical one first.
SYNONYMS = {
    'small': ('small', 'little'),
    'large': ('large', 'big'),
    'circle': ('circle', 'disc'),
    'square': ('square', 'box'),
    'moves': ('moves', 'goes'),
    'right': ('right', 'to the right'),
    'left': ('left', 'to the left'),
    'up': ('up', 'upwards'),
    'down': ('down', 'downwards'),
    'on': ('on', 'against'),
}


def caption(traits: Traits, seed: int | Sequence[int] | None = None) -> str:
    """Return the canonical caption, or with a seed one of several wordings that mean the same.

    A direction that is '' is left out, see `World.captioned`.
    """
    rng = None if seed is None else np.random.default_rng(seed)

    def worded(word: str) -> str:
        words = SYNONYMS.get(word, (word,))
        return words[0 if rng is None else rng.integers(len(words))]

    shape = f'a {worded(traits.size)} {traits.color} {worded(traits.shape)}'
    move = ' '.join(filter(None, (traits.speed, worded('moves'), worded(traits.direction))))
    background = f'{worded("on")} a {traits.background} background'
    if rng is not None and rng.integers(2):
        return f'{background}, {shape} {move}'
    return f'{shape} {move} {background}'


def parse(text: str) -> Traits:
    """Return the attributes of a caption in any wording.

    Raises:
      InputError: it is not a caption of this kind.
    """
    plain = ' '.join(text.lower().split()).rstrip('.')
    for pattern in _patterns():
        if found := pattern.fullmatch(plain):
            return Traits(*(_canonical(found[name] or '') for name in Traits._fields))
    example = caption(Traits('small', 'red', 'circle', 'right', '', 'blue'))
    raise InputError(f'{text!r} is no caption of moving shapes; write one like "{example}".')


@functools.cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """Return one pattern per order of the parts, with a group per attribute."""

    def among(words: Iterable[str]) -> str:
        return '|'.join(synonym for word in words for synonym in SYNONYMS.get(word, (word,)))

    shape = f'a (?P<size>{among(SIZES)}) (?P<color>{among(COLORS)}) (?P<shape>{among(REACHES)})'
    speed = f'(?:(?P<speed>{among(filter(None, SPEEDS))}) )?'
    move = f'{speed}(?:{among(["moves"])}) (?P<direction>{among(DIRECTIONS)})'
    background = f'(?:{among(["on"])}) a (?P<background>{among(COLORS)}) background'
    return re.compile(f'{shape} {move} {background}'), re.compile(f'{background},? {shape} {move}')


def _canonical(word: str) -> str:
    return next((canonical for canonical, synonyms in SYNONYMS.items() if word in synonyms), word)
