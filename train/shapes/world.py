"""The world of moving shapes: captioned videos that need no download and whose attributes can be read from pixels.

A clip shows one shape that moves over a plain background: "a small red circle moves right on a blue background".
Lengths are in sides, the shorter side of the picture, and times in clips, so that a scene can be drawn at any size and
with any number of frames:

* Size: shapes of one size have equal areas, that of a circle of the size's radius.
* Speed: a shape travels the same way in every clip of its speed, however many frames the clip has.
* Direction: that of the caption from the start on; in a world with turns, until the first one. Turn k of n falls at a
  random time in the first half of part k of the clip, which is cut in n + 1 equal parts; there the shape keeps its
  direction, turns left or turns right, with equal probability. Captions omit the turns.
* Place: the start is uniform over all places that keep the shape inside the picture for the whole path.
* Light and texture: in a shaded world, light falls on the shape from the upper left, and the background has a smooth
  pattern of its own in every clip. Neither hides an attribute, see `train.shapes.drawing`.
* Held out: the values of each attribute are numbered in the world's order; combinations whose numbers add up to
  m - 1 modulo m, m = `held_out`, are never trained on. Whatever is chosen for all attributes but one (of those that
  vary), it still occurs in training.

"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from neodragon_jax.base.errors import InputError, did_you_mean

COLORS = {
    'red': (220, 45, 40),
    'green': (45, 190, 65),
    'yellow': (240, 220, 50),
    'white': (240, 240, 240),
    'cyan': (60, 215, 230),
    'magenta': (225, 70, 210),
    'blue': (35, 50, 150),
    'black': (15, 15, 15),
    'gray': (110, 110, 110),
}
SIZES = {'small': 0.16, 'large': 0.22}  # radius of the circle of equal area, in sides
SPEEDS = {'slowly': 0.15, '': 0.26, 'quickly': 0.4}  # path length in a clip, in sides; the default speed has no word
DIRECTIONS = {'right': (1, 0), 'down': (0, 1), 'left': (-1, 0), 'up': (0, -1)}  # x, y, clockwise on the screen

# Half the side of a square, and the inner radius of an equilateral triangle, of area pi.
HALF_SQUARE, INNER_RADIUS = math.sqrt(math.pi) / 2, math.sqrt(math.pi / (3 * math.sqrt(3)))
# How far a shape of radius 1 reaches from its center of mass: left or right, up, down.
REACHES = {
    'circle': (1.0, 1.0, 1.0),
    'square': (HALF_SQUARE, HALF_SQUARE, HALF_SQUARE),
    'triangle': (math.sqrt(3) * INNER_RADIUS, 2 * INNER_RADIUS, INNER_RADIUS),
}

SPLITS = ('train', 'held_out', 'all')


class Traits(NamedTuple):
    """The attributes of a caption, in canonical words."""

    size: str
    color: str
    shape: str
    direction: str
    speed: str
    background: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """A clip before it is drawn.

    Attributes:
      start: x, y in 0..1 within the range of permitted starts, see the module's docstring.
      turns: (time in 0..1, new direction), in order; includes the times at which the shape goes straight on.
      texture: seed of light and texture; None for flat colors.
    """

    traits: Traits
    start: tuple[float, float] = (0.5, 0.5)
    turns: tuple[tuple[float, str], ...] = ()
    texture: int | None = None


@dataclasses.dataclass(frozen=True)
class World:
    """The scenes that occur.

    Attributes:
      sizes ... backgrounds: words of the values that occur.
      turns: how often a shape may turn in a clip.
      omitted: attributes that captions leave out, 'direction' or 'speed'.
      shaded: whether scenes have light and texture.
      held_out: m, of which one combination in m is held out; see the module.
    """

    sizes: tuple[str, ...]
    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    directions: tuple[str, ...]
    speeds: tuple[str, ...]
    backgrounds: tuple[str, ...]
    turns: int = 0
    held_out: int = 2
    omitted: tuple[str, ...] = ()
    shaded: bool = False

    def __post_init__(self) -> None:
        known = (SIZES, COLORS, REACHES, DIRECTIONS, SPEEDS, COLORS)
        for name, words, table in zip(Traits._fields, self.values, known, strict=True):
            for word in words:
                if word not in table:
                    raise InputError(f'World: no {name} is called {word!r}.{did_you_mean(word, table)}')
            if not words or len(set(words)) < len(words):
                raise InputError(f'World: {name} has {len(words)} values, some equal or none; list each once.')
        both = set(self.colors) & set(self.backgrounds)
        if both:
            raise InputError(f'World: {min(both)} is a color of shapes and of backgrounds; choose one.')
        if self.turns < 0 or self.held_out < 2:
            raise InputError(f'World: turns is {self.turns}, held_out {self.held_out}; give at least 0 and 2.')
        for name in self.omitted:
            if name not in ('direction', 'speed'):
                raise InputError(f'World: omitted has {name!r}; captions can leave out direction and speed.')

    @property
    def values(self) -> tuple[tuple[str, ...], ...]:
        """The words of each attribute, in the order of Traits."""
        return self.sizes, self.colors, self.shapes, self.directions, self.speeds, self.backgrounds

    @property
    def steady(self) -> float:
        """The share of the clip for which the direction is surely the caption's."""
        return 1 / (self.turns + 1)

    def captioned(self, traits: Traits) -> Traits:
        """Return the attributes as a caption has them: omitted ones are ''."""
        return traits._replace(**dict.fromkeys(self.omitted, ''))

    def numbers(self, traits: Traits) -> tuple[int, ...]:
        """Return the number of each value among the world's.

        Raises:
          InputError: a value does not occur in this world.
        """
        for name, word, words in zip(Traits._fields, traits, self.values, strict=True):
            if word not in words:
                raise InputError(f'{name} {word!r} does not occur in this world; use one of {", ".join(words)}.')
        return tuple(words.index(word) for word, words in zip(traits, self.values, strict=True))

    def is_held_out(self, traits: Traits) -> bool:
        """Return whether a combination is never trained on."""
        return sum(self.numbers(traits)) % self.held_out == self.held_out - 1

    def combinations(self, split: str = 'train') -> tuple[Traits, ...]:
        """Return all combinations of a split, in a fixed order."""
        return _combinations(self, split)

    def scene(self, seed: int, index: int, split: str = 'train') -> Scene:
        """Return scene `index` of an endless random sequence; it depends on the arguments only."""
        rng = np.random.default_rng((seed, index))
        combinations = self.combinations(split)
        traits = combinations[rng.integers(len(combinations))]
        x, y = rng.random(2)
        order, turns, heading = tuple(DIRECTIONS), [], traits.direction
        for part in range(1, self.turns + 1):
            heading = order[(order.index(heading) + int(rng.integers(-1, 2))) % len(order)]
            turns.append((float((part + rng.random() / 2) * self.steady), heading))
        texture = int(rng.integers(2**31)) if self.shaded else None
        return Scene(traits, (float(x), float(y)), tuple(turns), texture)


@functools.cache
def _combinations(world: World, split: str) -> tuple[Traits, ...]:
    if split not in SPLITS:
        raise InputError(f'split is {split!r}; use one of {", ".join(SPLITS)}.')
    every = (Traits(*words) for words in itertools.product(*world.values))
    return tuple(traits for traits in every if split == 'all' or world.is_held_out(traits) == (split == 'held_out'))


# 96 combinations, 24 held out; learned in minutes on a CPU.
CPU = World(
    sizes=('small',),
    colors=('red', 'green', 'yellow', 'white'),
    shapes=tuple(REACHES),
    directions=tuple(DIRECTIONS),
    speeds=('',),
    backgrounds=('blue', 'black'),
    held_out=4,
)
# 1,296 combinations, 216 held out; the turns make the future uncertain, as in real videos.
GPU = World(
    sizes=tuple(SIZES),
    colors=('red', 'green', 'yellow', 'white', 'cyan', 'magenta'),
    shapes=tuple(REACHES),
    directions=tuple(DIRECTIONS),
    speeds=tuple(SPEEDS),
    backgrounds=('blue', 'black', 'gray'),
    turns=2,
    held_out=6,
)
# Captions omit direction and speed, and there is a turn: a student that ignores its history loses the motion.
COLLAPSE = dataclasses.replace(CPU, speeds=('slowly', 'quickly'), turns=1, omitted=('direction', 'speed'))
# 864 combinations, 144 held out, with light and texture: clips that look like video.
VIVID = dataclasses.replace(GPU, speeds=('slowly', 'quickly'), turns=0, shaded=True)
WORLDS = {'cpu': CPU, 'gpu': GPU, 'collapse': COLLAPSE, 'vivid': VIVID}
