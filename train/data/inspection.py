"""Verdicts on video files: the clips to cut, or the reason for none. They are logged, because decoding takes hours."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import is_system_error
from neodragon_jax.base.json_file import as_json, parse_json
from neodragon_jax.base.progress import ProgressBar
from train.data.parallel import ordered_map
from train.data.video_files import Unusable, choose_size, cut, inspect

LOG = 'inspection.jsonl'
# Counts up when the rules for usable files change: verdicts by older rules are not taken over.
RULES = 3


@dataclasses.dataclass(frozen=True)
class Criteria:
    """Requirements of a usable file.

    Attributes:
      frames: of a clip.
      clips: of a file, at most.
      sizes: (height, width) to choose from.
    """

    frames: int
    clips: int
    min_fps: float
    sizes: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The clips to cut out of a file, or the reason why it is left out.

    Attributes:
      file: relative to the folder of videos.
      reason: why it is left out; empty if it is not.
      size: (height, width) of its clips.
      clips: indices of the frames of each clip.
      starts: seconds at which each clip begins.
      bytes, changed_ns: size and modification time of the file when it was inspected.
    """

    file: str
    reason: str = ''
    size: tuple[int, int] | None = None
    clips: tuple[tuple[int, ...], ...] = ()
    starts: tuple[float, ...] = ()
    bytes: int = 0
    changed_ns: int = 0

    def is_current(self, folder: pathlib.Path) -> bool:
        """Return whether the file is there and as it was when it was inspected."""
        try:
            return _mark(folder / self.file) == (self.bytes, self.changed_ns)
        except OSError:
            return False


def inspect_file(folder: pathlib.Path, name: str, criteria: Criteria) -> Verdict:
    """Return the verdict on one file; any problem with its content becomes a reason, not an exception.

    Raises:
      OSError: the system cannot read the file. A verdict would leave it out as long as its size and time stay the same.
    """
    try:
        footage = inspect(folder / name)
        size = choose_size(footage, criteria.sizes)
        clips = cut(footage, criteria.frames, criteria.clips, criteria.min_fps)
    except Unusable as problem:
        return Verdict(name, str(problem))
    except Exception as error:  # Files of unknown origin may raise any error.
        if is_system_error(error):
            raise
        return Verdict(name, f'cannot be read ({type(error).__name__}: {" ".join(str(error).split())})')
    indices = tuple(tuple(int(index) for index in clip) for clip in clips)
    starts = tuple(round(float(footage.times[clip[0]]), 6) for clip in indices)
    return Verdict(name, '', size, indices, starts)


def inspect_files(
    folder: pathlib.Path, names: Sequence[str], criteria: Criteria, out: pathlib.Path, workers: int
) -> list[Verdict]:
    """Return the verdicts on files, in their order; those of an earlier run are taken from its log in `out`.

    A file whose size or modification time has changed is inspected again.
    """
    log, settings = out / LOG, as_json(dataclasses.asdict(criteria) | {'rules': RULES})
    known = _read_log(log, settings)
    marks = {name: _mark(folder / name) for name in names}
    is_known = lambda name: name in known and (known[name].bytes, known[name].changed_ns) == marks[name]
    todo = [name for name in names if not is_known(name)]
    verdicts = {name: known[name] for name in names if is_known(name)}
    # Rewritten, because the last line of a killed run may be incomplete.
    with atomic_file(log) as partial:
        partial.write_text(''.join(f'{json.dumps(row)}\n' for row in (settings, *map(_to_json, known.values()))))
    inspected = ordered_map(lambda name: inspect_file(folder, name, criteria), todo, workers)
    with log.open('a') as file, ProgressBar(total=len(todo), unit='file', desc='inspection') as bar:
        for verdict in inspected:
            size, changed_ns = marks[verdict.file]
            verdicts[verdict.file] = dataclasses.replace(verdict, bytes=size, changed_ns=changed_ns)
            print(json.dumps(_to_json(verdicts[verdict.file])), file=file, flush=True)
            bar.update()
    return [verdicts[name] for name in names]


def log_left_out(verdict: Verdict, reason: str, out: pathlib.Path) -> None:
    """Log another verdict on a file, which `inspect_files` then returns: it is left out."""
    later = Verdict(verdict.file, reason, bytes=verdict.bytes, changed_ns=verdict.changed_ns)
    with (out / LOG).open('a') as file:
        print(json.dumps(_to_json(later)), file=file)


def _mark(path: pathlib.Path) -> tuple[int, int]:
    """Return the size and modification time of a file, which identify a changed file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _to_json(verdict: Verdict) -> dict[str, Any]:
    # JSON escapes everything but ASCII, so any file name becomes one line of valid text.
    return dataclasses.asdict(verdict)


def _read_log(path: pathlib.Path, settings: dict[str, Any]) -> dict[str, Verdict]:
    """Return file -> verdict of an earlier run with the same settings, up to the first damaged line."""
    known: dict[str, Verdict] = {}
    if not path.is_file():
        return known
    with path.open(errors='replace') as file:
        for number, line in enumerate(file):
            try:
                if number == 0:
                    if parse_json(line, dict[str, Any], str(path)) != settings:
                        break
                    continue
                verdict = parse_json(line, Verdict, str(path))
            except InputError:
                break
            known[verdict.file] = verdict
    return known
