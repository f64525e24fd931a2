"""Write captioned clips of moving shapes with exact attributes.

    python -m train.moving_shapes --out DATA --count 4096 --frames 17 --height 64 --width 64

Writes a sample set. With --videos, writes a folder of mp4 files and a table of captions instead, as input of
`train.captioned_clips`. Run the same command again to resume.

Legend: T frames, H W pixels.
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from neodragon_jax.base.atomic import PathLike, atomic_file, check_file_writable
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.output import output_folder
from neodragon_jax.base.progress import ProgressBar
from neodragon_jax.base.video import write_mp4
from neodragon_jax.generation.defaults import SIDE_MULTIPLE, check_size
from neodragon_jax.generation.options import check_seed
from train.data import ArraySpec, RecordSpec, SampleWriter
from train.shapes.source import MovingShapesSource
from train.shapes.world import SPLITS, WORLDS, Traits

FPS = 24
# A hidden file, so that no program reads the settings as a clip.
CAPTIONS, SETTINGS = 'captions.csv', '.moving_shapes.json'
PREVIEW_CLIPS, PREVIEW_FRAMES, PREVIEW_HEIGHT, PREVIEW_LABEL = 12, 6, 96, 20

EXAMPLES = """
worlds, at any size and length:
  cpu       4 colors x 3 shapes x 4 directions x 2 backgrounds, one size and one speed: learned in minutes
  gpu       6 colors x 3 shapes x 2 sizes x 4 directions x 3 speeds x 3 backgrounds, and turns that captions omit
  collapse  that of cpu at two speeds, with one turn; captions omit direction and speed, so that only history tells them
  vivid     that of gpu at two speeds, without turns, with light and textured backgrounds
Combinations of the split held_out never occur in the split train; train/shapes/world.py has the rules.

examples:
  python -m train.moving_shapes --out data/shapes --count 4096 --preview shapes.png
  python -m train.moving_shapes --out data/clips --count 512 --world gpu --frames 49 --height 128 --width 128 --videos

reading:
  train.data.SampleSource('data/shapes')[0]['video']
  tfds.builder_from_directory('data/shapes').as_data_source('train')[0]['video']
"""


def write_samples(source: MovingShapesSource, folder: PathLike, samples_per_shard: int = 256) -> None:
    """Write the missing samples; `SampleSource` and TFDS read the complete folder.

    Raises:
      InputError: the folder was begun with other settings.
    """
    arrays = {
        'video': ArraySpec((source.frames, *source.size, 3), 'uint8'),
        'attributes': ArraySpec((len(Traits._fields),), 'int32'),
        'combination': ArraySpec((), 'int32'),
        'track': ArraySpec((source.frames, 2), 'float32'),
    }
    with SampleWriter(
        folder,
        RecordSpec(arrays),
        len(source),
        protocol=source.metadata(),
        samples_per_shard=samples_per_shard,
        name='moving_shapes',
    ) as writer:
        for index in ProgressBar(writer.missing(), unit='clip'):
            writer.append(source[index])


def write_videos(source: MovingShapesSource, folder: PathLike) -> None:
    """Write the missing mp4 files of a folder, then the table of their captions.

    Raises:
      InputError: the folder was begun with other settings.
    """
    folder = pathlib.Path(folder)
    settings = json.dumps(source.metadata(), indent=2) + '\n'
    if not (folder / SETTINGS).exists():
        with atomic_file(folder / SETTINGS) as path:
            path.write_text(settings)
    elif (folder / SETTINGS).read_text() != settings:
        raise InputError(
            f'{folder / SETTINGS}: was written with other settings; choose another folder, or repeat those settings.'
        )
    names = [f'{index:06d}.mp4' for index in range(len(source))]
    for index, name in enumerate(ProgressBar(names, unit='clip')):
        if not (folder / name).exists():
            write_mp4(folder / name, source[index]['video'], FPS)
    with atomic_file(folder / CAPTIONS) as path, path.open('w', newline='', encoding='utf-8') as file:
        table = csv.writer(file)
        table.writerow(('file', 'caption', *Traits._fields))
        table.writerows((name, source.caption(i), *source.scene(i).traits) for i, name in enumerate(names))


def preview(path: PathLike, clips: Sequence[UInt8[np.ndarray, 'T H W 3']], labels: Sequence[str]) -> None:
    """Write one picture with a row per clip: evenly spaced frames, first and last included, under the clip's label."""
    _, height, width, _ = clips[0].shape
    tile_width, row_height = round(PREVIEW_HEIGHT * width / height), PREVIEW_HEIGHT + PREVIEW_LABEL
    sheet = Image.new('RGB', (PREVIEW_FRAMES * (tile_width + 2), len(clips) * row_height), 'white')
    write, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (clip, label) in enumerate(zip(clips, labels, strict=True)):
        write.text((2, row * row_height + 2), label, fill='black', font=font)
        shown = np.linspace(0, len(clip) - 1, PREVIEW_FRAMES).round().astype(int)
        for column, frame in enumerate(clip[shown]):
            tile = Image.fromarray(frame).resize((tile_width, PREVIEW_HEIGHT), Image.Resampling.NEAREST)
            sheet.paste(tile, (column * (tile_width + 2), row * row_height + PREVIEW_LABEL))
    with atomic_file(path) as temporary:
        sheet.save(temporary, format='PNG')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    description = 'Write captioned clips of moving shapes, with exact attributes.'
    parser = command_parser('python -m train.moving_shapes', description, EXAMPLES)
    add = parser.add_argument_group('files').add_argument
    add('--out', action=PathOption, required=True, metavar='DIR', help='folder of the dataset')
    add('--count', type=int, default=4096, metavar='N', help='number of clips (default: %(default)s)')
    add('--world', choices=tuple(WORLDS), default='cpu', help='world of the scenes (default: %(default)s)')
    add('--split', choices=SPLITS, default='train',
        help='split of the combinations of attributes (default: %(default)s)')  # fmt: skip
    add('--frames', type=int, default=17, metavar='N', help='frames of a clip, 8 n + 1 (default: %(default)s)')
    add('--height', type=int, default=64, metavar='PX',
        help=f'height, a multiple of {SIDE_MULTIPLE} (default: %(default)s)')  # fmt: skip
    add('--width', type=int, default=64, metavar='PX',
        help=f'width, a multiple of {SIDE_MULTIPLE} (default: %(default)s)')  # fmt: skip
    add('--seed', type=int, default=0, help='seed of the scenes (default: %(default)s)')
    add('--paraphrase', action='store_true', help='write captions in random wordings instead of the canonical one')
    add('--videos', action='store_true', help=f'write mp4 files and {CAPTIONS} instead of a TFDS dataset')
    add('--preview', action=PathOption, metavar='FILE',
        help='also write a PNG: frames of the first clips, with captions')  # fmt: skip
    add('--samples-per-shard', type=int, default=256, metavar='N', help='samples per file (default: %(default)s)')
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write the clips of a command line.

    Raises:
      InputError: an option is out of range, or the folder was begun with other settings.
    """
    _check(args)
    size = (args.height, args.width)
    source = MovingShapesSource(
        WORLDS[args.world], args.frames, size, args.seed, args.count, args.split, args.paraphrase
    )
    if args.preview:
        check_file_writable(args.preview)
    with output_folder(args.out):
        if args.videos:
            write_videos(source, args.out)
        else:
            write_samples(source, args.out, args.samples_per_shard)
    if args.preview:
        samples = [source[index] for index in range(min(PREVIEW_CLIPS, len(source)))]
        clips, captions = ([sample[name] for sample in samples] for name in ('video', 'prompt'))
        preview(args.preview, clips, captions)
    print(f'{args.out}: {len(source)} clips of {args.frames} frames, {args.height}x{args.width}')


def _check(args: argparse.Namespace) -> None:
    """Raise InputError if an option is out of range."""
    check_size(args.frames, args.height, args.width)
    check_seed(args.seed)
    if args.samples_per_shard < 1:
        raise InputError(f'--samples-per-shard is {args.samples_per_shard}; give at least 1.')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_args(argv)))


if __name__ == '__main__':
    sys.exit(main())
