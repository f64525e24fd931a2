"""Read the attributes that videos of moving shapes show, and compare them with their captions.

    python -m train.shapes.read --captions 48 > captions.txt
    python -m neodragon_jax --prompts-file captions.txt --out VIDEOS
    python -m train.shapes.read --videos VIDEOS

No learned model takes part: `train.shapes.attributes` has the rules. `train.shapes.fill` reads the shape a second
time, by other rules.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import read_mp4
from neodragon_jax.generation.options import check_seed
from train.shapes.attributes import NUMBERS, Attributes, columns, measure
from train.shapes.captions import parse
from train.shapes.fill import Filled, read_fill
from train.shapes.source import MovingShapesSource
from train.shapes.world import WORLDS, World

EXAMPLES = """
examples:
  48 captions of combinations that were never trained on, in random wordings:
    python -m train.shapes.read --captions 48 > captions.txt

  the attributes of their videos:
    python -m neodragon_jax --prompts-file captions.txt --out out/videos
    python -m train.shapes.read --videos out/videos
"""


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """Options of this command; one of the first two is None.

    Attributes:
      captions: number of captions to print.
      world: name of one of WORLDS.
      seed: of the captions.
    """

    videos: pathlib.Path | None
    captions: int | None
    world: str
    seed: int


def parse_options(argv: Sequence[str] | None = None) -> ReadOptions:
    """Return the options of a command line.

    Raises:
      InputError: the seed is out of range, or neither videos nor a number of captions is given, or both are.
    """
    description = 'Read color, shape, direction and background from videos, and compare them with the captions.'
    parser = command_parser('python -m train.shapes.read', description, EXAMPLES)
    add = parser.add_argument
    add('--videos', action=PathOption, metavar='DIR', help='folder with {caption}-{i}.mp4')
    add('--captions', type=int, metavar='N', help='print N held-out captions instead')
    add('--world', choices=WORLDS, default='cpu', help='world of the captions (default: %(default)s)')
    add('--seed', type=int, default=0, help='seed of the captions (default: %(default)s)')
    options = ReadOptions(**vars(parser.parse_args(argv)))
    check_seed(options.seed)
    if (options.videos is None) == (options.captions is None):
        raise InputError('give either --videos DIR or --captions N.')
    return options


def held_out_captions(world: World, count: int, seed: int) -> list[str]:
    """Return different captions of held-out combinations, in random wordings and in a random order.

    Raises:
      InputError: the number is not between 1 and twice the number of combinations.
    """
    most = 2 * len(world.combinations('held_out'))
    if not 1 <= count <= most:
        raise InputError(f'--captions {count}: give 1 to {most}, two for each held-out combination.')
    source = MovingShapesSource(world, 1, (16, 16), seed, 64 * most, 'held_out', paraphrase=True)
    drawn = dict.fromkeys(source.caption(index) for index in range(len(source)))
    return list(drawn)[:count]


class Reading(NamedTuple):
    """What two readers see in a video."""

    attributes: Attributes
    second: Filled


def read(folder: pathlib.Path, world: World) -> dict[str, Reading]:
    """Return the attributes of every video of a folder by its file name.

    Raises:
      InputError: there is no video, or a name is not a caption of this world.
    """
    paths = sorted(path for path in folder.glob('*.mp4') if not path.name.startswith('.'))
    if not paths:
        raise InputError(f'{folder}: no .mp4 in it. Give the folder that `python -m neodragon_jax --out` wrote.')
    expected = {path: parse(path.stem.rpartition('-')[0]) for path in paths}
    found = {}
    for path, traits in expected.items():
        video = read_mp4(path)
        found[path.name] = Reading(measure(video, traits, world), read_fill(video))
    return found


def report(seen: Mapping[str, Reading]) -> list[str]:
    """Return a line per attribute with the number of videos that show it, and a line per video that misses one."""
    values = columns([one.attributes for one in seen.values()])
    values['shape, second reader'] = [float(one.second.shape == one.attributes.expected.shape) for one in seen.values()]
    shown = [f'| attribute | right in | of {len(seen)} |', '|---|---:|---:|']
    for name, column in values.items():
        count = '' if name in NUMBERS and name != 'steady' else str(round(sum(column)))
        shown.append(f'| {name} | {count} | {sum(column) / len(column):.3f} |')
    for name, (clip, _) in seen.items():
        wrong = [f'{key} {getattr(clip, key) or "unreadable"}' for key, right in clip.correct().items() if not right]
        wrong += [] if clip.steady else ['a shape that changes']
        shown += [f'{name}: {", ".join(wrong)}'] if wrong else []
    return shown


def run(argv: Sequence[str] | None = None) -> None:
    """Print the captions or the attributes of a command line."""
    options = parse_options(argv)
    world = WORLDS[options.world]
    if options.captions is not None:
        print('\n'.join(held_out_captions(world, options.captions, options.seed)))
    elif options.videos is not None:
        print('\n'.join(report(read(options.videos, world))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(argv))


if __name__ == '__main__':
    sys.exit(main())
