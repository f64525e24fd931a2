"""Cut clips of one length and frame rate from a folder of captioned videos, as input of the VAE.

    python -m train.captioned_clips --videos DIR --captions captions.csv --out CLIPS --frames 49 --sizes 320x512 512x320

Every video is decoded to its end. Videos are left out if they are damaged, truncated, too short or too small, if they
have no usable caption, or if they are HDR, interlaced, transparent or of unusual colors; CLIPS/report.tsv has the
reasons. All others are resampled to 24 frames per second by their frame timestamps, cropped to the size that keeps most
of the picture, and stored as H.264 with their captions.

Each size is a separate sample set, CLIPS/320x512 and so on: batches are arrays of one shape, a training step is
compiled per shape, and training chooses the shares of the sizes (train.data.mixture).

Run the same command again to resume. After videos or captions were added, changed or removed, it inspects and encodes
only the new videos.

Legend: T frames, H W pixels.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.output import output_folder
from neodragon_jax.generation.plan import make_plan
from train.data.captions import Captions, file_key, read_sidecars, read_table, sidecars
from train.data.clip_report import REPORT, print_summary, write_report
from train.data.clip_writer import ClipOptions, Unreadable, size_name, write_clips
from train.data.inspection import Criteria, Verdict, inspect_files, log_left_out

EXAMPLES = """
captions: a .csv or .tsv with a header, or a .jsonl with one object per line. The columns are file (or file_name, path,
video), relative to --videos, and caption (or text, prompt). Without --captions: a text file a.txt beside each a.mp4.

examples:
  videos of both orientations, captions in a table:
    python -m train.captioned_clips --videos DIR --captions captions.csv --out CLIPS --sizes 320x512 512x320

  pictures, which train the first frame, captions in text files; then mixed with clips by train.data.mixture:
    python -m train.captioned_clips --videos PICTURES --out STILLS --frames 1 --sizes 320x512

  then, for each size, latents and text states:
    python -m train.latents --checkpoint CKPT --clips CLIPS --out LATENTS
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    description = 'Cut validated clips of one length, at 24 frames per second, out of a folder of captioned videos.'
    parser = command_parser('python -m train.captioned_clips', description, EXAMPLES)
    add = parser.add_argument_group('files').add_argument
    add('--videos', action=PathOption, required=True, metavar='DIR',
        help='folder of videos and pictures, searched at any depth')  # fmt: skip
    add('--captions', action=PathOption, metavar='FILE', help='.csv or .jsonl (default: text files beside the videos)')
    add('--out', action=PathOption, required=True, metavar='DIR', help=f'folder for one dataset per size, and {REPORT}')
    _add_clips(parser.add_argument_group('clips').add_argument)
    add = parser.add_argument_group('computation').add_argument
    add('--samples-per-shard', type=int, default=256, metavar='N', help='samples per file (default: %(default)s)')
    add('--workers', type=int, default=os.cpu_count() or 1, metavar='N',
        help='threads that inspect and encode files (default: one per core)')  # fmt: skip
    return parser.parse_args(argv)


def _add_clips(add: Callable[..., object]) -> None:
    add('--frames', type=int, default=49, metavar='N', help='frames of a clip, 8 n + 1; 1: pictures (default: 49)')
    add('--sizes', nargs='+', default=['320x512'], metavar='HxW',
        help='sizes of the clips; each video is cropped to the one that keeps most of it without enlarging it '
        '(default: 320x512)')  # fmt: skip
    add('--clips-per-video', type=int, default=1, metavar='N',
        help='largest number of clips per video, evenly spaced, without overlap, with the same caption (default: 1, '
        'from the middle)')  # fmt: skip
    add('--min-fps', type=float, default=23.0, metavar='F',
        help='lowest frame rate; slower videos are left out, because frames would repeat (default: 23)')  # fmt: skip
    add('--quality', type=int, default=12, metavar='CRF',
        help="x264's quality of the stored clips, from 0 (largest files) to 51 (default: %(default)s)")  # fmt: skip


def read_sizes(texts: Sequence[str], frames: int) -> list[tuple[int, int]]:
    """Return (height, width) of each size.

    Raises:
      InputError: a value is not HxW, or the size or length is unsupported.
    """
    sizes = []
    for text in texts:
        match = re.fullmatch(r'(\d+)x(\d+)', text)
        if match is None:
            raise InputError(f'--sizes {text}: not a size; give height x width in pixels, such as 320x512.')
        height, width = int(match[1]), int(match[2])
        make_plan('hybrid', frames, height, width)
        sizes.append((height, width))
    return list(dict.fromkeys(sizes))


def find_files(folder: pathlib.Path, leave_out: Sequence[PathLike]) -> list[str]:
    """Return the files in a folder, relative and sorted, without hidden files and caption files beside other files.

    Args:
      leave_out: files and whole folders to leave out.
    Raises:
      InputError: the folder is not there, or has no files.
      OSError: the system cannot list a folder in it, for another reason than permissions.
    """
    if not folder.is_dir():
        raise InputError(f'--videos {folder}: no such folder. Give a folder of videos.')
    excluded = [pathlib.Path(path).resolve() for path in leave_out]
    names, visited = set(), {folder.resolve()}
    for root, folders, files in os.walk(folder, onerror=_lost, followlinks=True):
        here = pathlib.Path(root)
        inside = {name: (here / name).resolve() for name in folders if name[0] != '.'}
        # A link may point to a visited folder or form a cycle.
        folders[:] = [name for name in sorted(inside) if inside[name] not in (*excluded, *visited)]
        visited |= {inside[name] for name in folders}
        for name in files:
            if name[0] != '.' and (here / name).is_file() and (here / name).resolve() not in excluded:
                names.add(os.path.relpath(here / name, folder))
    captions = {sidecar for name in names for sidecar in sidecars(name) if sidecar != name}
    found = sorted(names - captions)
    if not found:
        raise InputError(f'--videos {folder}: no files in it. Give a folder of videos.')
    return found


def _lost(error: OSError) -> None:
    """Stop at a folder that cannot be listed: without its files, sets would be written again, smaller."""
    if not isinstance(error, PermissionError):  # such as lost+found, which stays closed
        raise error


def inspect_all(options: ClipOptions, names: Sequence[str], captions: Captions) -> list[Verdict]:
    """Return the verdict on every file, and on every caption without one."""
    described = [name for name in names if captions.of(name) is not None]
    verdicts = [Verdict(name, captions.problem_of(name)) for name in names if captions.of(name) is None]
    verdicts += inspect_files(options.videos, described, options.criteria, options.out, options.workers)
    keys = {file_key(name) for name in names}
    keys |= {os.path.splitext(key)[0] for key in keys}
    verdicts += [Verdict(file, reason) for file, reason in captions.problems.items() if file not in keys]
    verdicts += [Verdict(file, 'has a caption, but is not there') for file in captions.by_file if file not in keys]
    return sorted(verdicts, key=lambda verdict: verdict.file)


def read_options(args: argparse.Namespace) -> ClipOptions:
    """Return the checked options of a command line.

    Raises:
      InputError: an option is wrong.
    """
    for name, least in (('clips_per_video', 1), ('workers', 1), ('samples_per_shard', 1), ('quality', 0)):
        if getattr(args, name) < least:
            raise InputError(f'--{name.replace("_", "-")} is {getattr(args, name)}; give at least {least}.')
    if args.quality > 51:
        raise InputError(f'--quality is {args.quality}; give 0 (largest files) to 51.')
    if not 0 <= args.min_fps < math.inf:
        raise InputError(f'--min-fps is {args.min_fps}; give frames per second, such as 23.')
    videos, out = pathlib.Path(os.path.realpath(args.videos)), pathlib.Path(os.path.realpath(args.out))
    if out.is_relative_to(videos):
        raise InputError(f'--out {args.out}: lies in the folder of --videos; choose a folder outside of it.')
    sizes = read_sizes(args.sizes, args.frames)
    criteria = Criteria(args.frames, args.clips_per_video, args.min_fps, tuple(sizes))
    return ClipOptions(args.videos, args.out, criteria, args.quality, args.samples_per_shard, args.workers)


def run(args: argparse.Namespace) -> None:
    """Run a command line; one process at a time writes into the folder.

    Raises:
      InputError: an argument is wrong, or no file is usable.
    """
    options = read_options(args)
    with output_folder(options.out):
        cut_clips(options, args.captions)


def cut_clips(options: ClipOptions, table: pathlib.Path | None) -> None:
    """Inspect all files, then write the missing clips.

    Args:
      table: table of captions; None for text files beside the videos.
    Raises:
      InputError: the table cannot be read, or no file is usable.
    """
    folder, out = options.videos, options.out
    names = find_files(folder, [out, *([table] if table else [])])
    captions = read_table(table, folder) if table else read_sidecars(folder, names)
    while True:
        verdicts = inspect_all(options, names, captions)
        write_report(out / REPORT, verdicts)
        try:
            counts = write_sets(options, verdicts, captions)
            break
        except Unreadable as problem:
            log_left_out(problem.verdict, problem.reason, out)
    if captions.repeated:
        print(f'{len(captions.repeated)} files have several captions; the first is used. One: {captions.repeated[0]}')
    print_summary(out, verdicts, counts)
    if not counts:
        raise InputError(f'--videos {folder}: no file is usable; see {out / REPORT} for the reasons.')


def write_sets(options: ClipOptions, verdicts: Sequence[Verdict], captions: Captions) -> dict[str, int]:
    """Write the missing clips of every size; return the folder of each size -> number of its clips.

    Raises:
      InputError, Unreadable: as of `write_clips`.
    """
    by_size: dict[tuple[int, int], list[Verdict]] = collections.defaultdict(list)
    for verdict in verdicts:
        if verdict.size is not None:
            by_size[verdict.size].append(verdict)
    return {
        size_name(size): write_clips(options, size, by_size[size], captions)
        for size in options.criteria.sizes
        if by_size[size]
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_args(argv)))


if __name__ == '__main__':
    sys.exit(main())
