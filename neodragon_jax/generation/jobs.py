"""Jobs of a run: one video file per prompt and sample, divided among processes, without finished ones."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from neodragon_jax.base.bucket import TRANSFERS, StoragePath
from neodragon_jax.base.errors import InputError

MAX_NAME_BYTES = 200
# A mistyped number of samples would fill the memory.
MAX_VIDEOS = 10**6
# Characters that file names cannot hold, or that a terminal or another file system would not show.
_UNSAFE = re.compile(r'[/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to make."""

    prompt: str
    number: int
    path: StoragePath


class Jobs(NamedTuple):
    """The jobs of a process.

    Attributes:
      todo: those to be done.
      made: those whose files are there and whole.
      damaged: those of `todo` of which a file is there but damaged, or its contact sheet is missing.
    """

    todo: list[Job]
    made: list[Job]
    damaged: list[Job]


def video_name(prompt: str, number: int) -> str:
    """Return the file name `{prompt}-{number}` that VBench expects, without suffix.

    A prompt that cannot be a file name is changed: unsafe characters and a leading dot become '_', and long prompts
    are cut. A changed name ends in '~' and a digest of the prompt, so that two prompts never share a file.
    """
    name = _UNSAFE.sub('_', prompt)
    name = '_' + name[1:] if name.startswith('.') else name
    name = name.encode()[:MAX_NAME_BYTES].decode(errors='ignore')
    if not name or name != prompt:
        name += '~' + hashlib.sha256(prompt.encode(errors='surrogateescape')).hexdigest()[:8]
    return f'{name}-{number}'


def share(jobs: Sequence[Job], index: int, count: int) -> list[Job]:
    """Return the jobs of one of `count` processes: every count-th, so that their numbers differ by one at most."""
    return list(jobs[index::count])


def make_jobs(prompts: Sequence[str], samples: int, out: StoragePath, index: int = 0, count: int = 1) -> Jobs:
    """Return the jobs of process `index` of `count`, by the state of their files.

    Args:
      samples: videos per prompt.
      out: folder of the videos.
    Raises:
      InputError: there are more than MAX_VIDEOS, or a folder has the name of a video.
    """
    if len(prompts) * samples > MAX_VIDEOS:
        raise InputError(
            f'--num-samples {samples}: with {len(prompts)} prompts, that is more than {MAX_VIDEOS:,} videos; make them '
            'in several runs.'
        )
    jobs = [
        Job(prompt, number, out / f'{video_name(prompt, number)}.mp4')
        for prompt in prompts
        for number in range(samples)
    ]
    # Divide the jobs before looking for files: other processes may already have written some of theirs.
    jobs = share(jobs, index, count)
    # Files in a bucket answer slowly.
    with concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool:
        states = list(pool.map(_state, jobs))
    made, damaged = ([job for job, state in zip(jobs, states, strict=True) if state is one] for one in (True, False))
    return Jobs([job for job, state in zip(jobs, states, strict=True) if not state], made, damaged)


def _state(job: Job) -> bool | None:
    """Return whether the files of a video are whole; None if there is no video."""
    if not job.path.exists():
        return None
    # Imported late: a new folder needs no decoder.
    from neodragon_jax.generation.record import is_whole

    if job.path.is_dir():
        raise InputError(f'{job.path}: a folder has the name of a video; rename it, or give another --out.')
    return is_whole(job.path)
