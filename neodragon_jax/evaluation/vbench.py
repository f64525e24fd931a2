"""Prompts and scores of VBench, which is run in a separate environment.

Source: Huang et al., VBench, arXiv 2311.17982; command line and prompt list of the package vbench 0.1.5.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import read_json

# Its prompts with their dimensions, in the package's folder; and how many videos of each it looks at.
PROMPTS = 'VBench_full_info.json'
SAMPLES = 5

VBENCH_INSTALL = 'python3 -m venv ~/vbench && ~/vbench/bin/pip install vbench'
# Dimensions that VBench measures on its own prompts; the first six also on any others.
ANY_PROMPT = (
    'subject_consistency',
    'background_consistency',
    'motion_smoothness',
    'dynamic_degree',
    'aesthetic_quality',
    'imaging_quality',
)
DIMENSIONS = (
    *ANY_PROMPT,
    'temporal_flickering',
    'object_class',
    'multiple_objects',
    'human_action',
    'color',
    'spatial_relationship',
    'scene',
    'appearance_style',
    'temporal_style',
    'overall_consistency',
)
MODES = {'vbench_standard': DIMENSIONS, 'custom_input': ANY_PROMPT}


def find_vbench(command: str, mode: str, dimensions: Sequence[str]) -> str:
    """Return the path of VBench's program.

    Raises:
      InputError: the program is not found, or does not measure one of the dimensions in this mode.
    """
    for name in dimensions:
        if name not in MODES[mode]:
            raise InputError(f'--vbench-dimensions {name}: not in mode {mode}; choose from {", ".join(MODES[mode])}.')
    path = shutil.which(os.path.expanduser(command))
    if path is None:
        raise InputError(
            f'--vbench {command}: no such program. Install it in its own environment ({VBENCH_INSTALL}), then pass '
            '--vbench ~/vbench/bin/vbench.'
        )
    return path


def find_prompts(command: str) -> pathlib.Path:
    """Return the path of the prompt list in the package of VBench's program.

    Raises:
      InputError: the program is not found, or its package has no list.
    """
    program = pathlib.Path(find_vbench(command, 'vbench_standard', ()))
    # The package is not imported, because that takes seconds and needs PyTorch.
    query = 'import importlib.util as u; print(*(s.origin for s in [u.find_spec("vbench")] if s))'
    found = subprocess.run([_interpreter(program), '-c', query], capture_output=True, text=True, check=False)
    path = pathlib.Path(found.stdout.strip()).parent / PROMPTS
    if not found.stdout.strip() or not path.is_file():
        raise InputError(
            f'{program}: no {PROMPTS} in its package. Install it again ({VBENCH_INSTALL}), or give the file with '
            '--prompts-file.'
        )
    return path


def _interpreter(program: pathlib.Path) -> str:
    """Return the Python of an installed command: that of its first line, else the one beside it."""
    with program.open('rb') as file:
        first = file.readline().decode(errors='replace').strip()
    named = first.removeprefix('#!').strip()
    return named if first.startswith('#!') and os.access(named, os.X_OK) else str(program.with_name('python'))


def run_vbench(
    program: str, videos: Sequence[pathlib.Path], out: pathlib.Path, mode: str, dimensions: Sequence[str]
) -> dict[str, float | None]:
    """Run VBench on videos, one dimension after the other; return its scores, None for those it did not compute."""
    # VBench itself starts `python`, which must be that of its environment.
    path = os.pathsep.join([str(pathlib.Path(program).absolute().parent), os.environ.get('PATH', '')])
    scores: dict[str, float | None] = {}
    # VBench treats every file of the folder as a video, so contact sheets are left out.
    with tempfile.TemporaryDirectory(prefix='videos-') as links:
        for video in videos:
            (pathlib.Path(links) / video.name).symlink_to(video.absolute())
        for name in dimensions:
            print(f'vbench {name}: {len(videos)} videos', flush=True)
            with tempfile.TemporaryDirectory(prefix='vbench-') as results:
                command = [program, 'evaluate', '--videos_path', links, '--dimension', name]
                command += ['--mode', mode, '--output_path', results]
                subprocess.run(command, env=os.environ | {'PATH': path}, check=False)
                scores[name] = _read_score(pathlib.Path(results), name)
                shutil.copytree(results, out / name, dirs_exist_ok=True)
    return scores


def _read_score(results: pathlib.Path, dimension: str) -> float | None:
    """Return the score in VBench's result file: [score, details per video] under the dimension."""
    for path in sorted(results.glob('*eval_results.json')):
        try:
            return float(read_json(path, dict[str, Any])[dimension][0])
        except (ValueError, KeyError, TypeError, IndexError):
            continue
    return None
