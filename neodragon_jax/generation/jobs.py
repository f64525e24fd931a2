"""Jobs of a run: one video file per prompt and sample, divided among processes, without existing files."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence

from neodragon_jax.base.bucket import StoragePath
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


def make_jobs(
    prompts: Sequence[str], samples: int, out: StoragePath, index: int = 0, count: int = 1
) -> tuple[list[Job], int]:
    """Return the jobs of process `index` of `count` whose videos do not exist, and the number of those that do.

    Args:
      samples: videos per prompt.
      out: folder of the videos.
    Raises:
      InputError: there are more than MAX_VIDEOS.
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
    # The contact sheet is written first, so an existing video is complete.
    todo = [job for job in jobs if not job.path.exists()]
    return todo, len(jobs) - len(todo)
