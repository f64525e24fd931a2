"""Verdicts on video files: which clips to cut, or why there are none. They are kept, because decoding takes hours."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import tqdm

from train.data.parallel import ordered_map
from train.data.video_files import Unusable, choose_size, cut, inspect

LOG = 'inspection.jsonl'


@dataclasses.dataclass(frozen=True)
class Criteria:
    """What makes a file usable.

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
    """What becomes of a file.

    Attributes:
      file: relative to the folder of videos.
      reason: why it is left out; empty if it is not.
      size: (height, width) of its clips.
      clips: indices of the frames of each clip.
      starts: seconds at which each clip begins.
    """

    file: str
    reason: str = ''
    size: tuple[int, int] | None = None
    clips: tuple[tuple[int, ...], ...] = ()
    starts: tuple[float, ...] = ()


def judge_file(folder: pathlib.Path, name: str, criteria: Criteria) -> Verdict:
    """Return the verdict on one file; whatever is wrong with it is a reason, not an exception."""
    try:
        footage = inspect(folder / name)
        size = choose_size(footage, criteria.sizes)
        clips = cut(footage, criteria.frames, criteria.clips, criteria.min_fps)
    except Unusable as problem:
        return Verdict(name, str(problem))
    except Exception as error:  # Among a million files of unknown origin, one finds an error that nobody thought of.
        return Verdict(name, f'cannot be read ({type(error).__name__}: {" ".join(str(error).split())})')
    indices = tuple(tuple(int(index) for index in clip) for clip in clips)
    starts = tuple(round(float(footage.times[clip[0]]), 6) for clip in indices)
    return Verdict(name, '', size, indices, starts)


def inspect_files(
    folder: pathlib.Path, names: Sequence[str], criteria: Criteria, out: pathlib.Path, workers: int
) -> list[Verdict]:
    """Return the verdicts on files, in their order; those of an earlier run are taken from its log in `out`.

    A file whose size or time of change is another is inspected again.
    """
    log, settings = out / LOG, dataclasses.asdict(criteria)
    known = _read_log(log, json.loads(json.dumps(settings)))
    marks = {name: _mark(folder / name) for name in names}
    todo = [name for name in names if known.get(name, ({}, None))[0] != marks[name]]
    verdicts = {name: verdict for name, (_, verdict) in known.items() if name in marks}
    out.mkdir(parents=True, exist_ok=True)
    # Written anew, because the last line of a killed run may be half there.
    partial = log.with_name(f'.{log.name}')
    with partial.open('w') as file:
        print(json.dumps(settings), file=file)
        for mark, verdict in known.values():
            print(_log_line(mark, verdict), file=file)
    os.replace(partial, log)
    judged = ordered_map(lambda name: judge_file(folder, name, criteria), todo, workers)
    with log.open('a') as file, tqdm.tqdm(total=len(todo), unit='file', desc='inspection', disable=None) as bar:
        for verdict in judged:
            verdicts[verdict.file] = verdict
            print(_log_line(marks[verdict.file], verdict), file=file, flush=True)
            bar.update()
    return [verdicts[name] for name in names]


def _mark(path: pathlib.Path) -> dict[str, Any]:
    """Return what tells that a file is still the same."""
    status = path.stat()
    return {'bytes': status.st_size, 'changed_ns': status.st_mtime_ns}


def _log_line(mark: dict[str, Any], verdict: Verdict) -> str:
    # JSON escapes all but ASCII, so that any file name is one line of valid text.
    return json.dumps(mark | dataclasses.asdict(verdict))


def _read_log(path: pathlib.Path, settings: dict[str, Any]) -> dict[str, tuple[dict[str, Any], Verdict]]:
    """Return file -> (mark, verdict) of an earlier run with the same settings, up to where it was killed."""
    known: dict[str, tuple[dict[str, Any], Verdict]] = {}
    if not path.is_file():
        return known
    with path.open() as file:
        for number, line in enumerate(file):
            try:
                row = json.loads(line)
            except ValueError:
                break
            if number == 0:
                if row != settings:
                    break
                continue
            mark = {name: row.pop(name) for name in ('bytes', 'changed_ns')}
            size = tuple(row['size']) if row['size'] else None
            clips = tuple(tuple(clip) for clip in row['clips'])
            known[row['file']] = mark, Verdict(row['file'], row['reason'], size, clips, tuple(row['starts']))
    return known
