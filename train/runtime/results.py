"""Results in the folder of a run: `result`, as of its last step, and `best`, as of its best evaluation.

Both folders belong to the run. One that has the files of its result already is left as it is, with all other files in
it; another result replaces the whole folder when it is complete.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from neodragon_jax.base.atomic import atomic_folder
from neodragon_jax.base.bucket import INCOMPLETE, StoragePath
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import as_json, parse_json
from train.runtime.checkpoints import Checkpoints
from train.runtime.processes import of_first_process
from train.runtime.program import Program

# Names inside the run's folder, and the file in BEST that tells its step and metric.
RESULT, BEST, RECORD = 'result', 'best', 'best.json'


def check_no_result(run: StoragePath) -> None:
    """Refuse to begin a run in a folder that has a result, and no checkpoint to continue from; all processes call it.

    Raises:
      InputError: the new run would replace the result and the log of a run whose checkpoints are gone.
    """
    first = jax.process_index() == 0
    found = of_first_process([name for name in (RESULT, BEST) if first and _has_content(run / name)])
    if found:
        raise InputError(
            f'{run} has {" and ".join(found)}, but no checkpoint to continue from; the run would begin anew and '
            'replace them. Give another config.workdir, or remove the folder.'
        )


def _has_content(folder: StoragePath) -> bool:
    return folder.exists() and any(True for _ in folder.iterdir())


def write_result(program: Program, state: Any, folder: StoragePath, record: Mapping[str, Any] | None = None) -> None:
    """Write the result of a state into a folder; all processes call it.

    Args:
      record: JSON that is written beside it, into the file RECORD.
    """
    if jax.process_index() != 0:
        program.finish(state, pathlib.Path('unused'))
        return
    with atomic_folder(folder, replace=True, keep_equal=True) as draft:
        program.finish(state, draft)
        if record is not None:
            (draft / RECORD).write_text(json.dumps(record, indent=2) + '\n')


def write_if_best(program: Program, state: Any, step: int, checkpoints: Checkpoints, run: StoragePath) -> None:
    """Write the result of the state of a step into `run/best` if its checkpoint is the best."""
    best = checkpoints.best()
    if best is not None and best['step'] == step:
        write_result(program, state, run / BEST, best)


def restore_best(program: Program, abstract_carry: Any, checkpoints: Checkpoints, run: StoragePath) -> None:
    """Write the result of the best checkpoint into `run/best`, unless it is there.

    It is not if the run was killed between a checkpoint and its result, if a version without `run/best` made the
    checkpoints, or if another metric is to tell the best.

    Raises:
      InputError: the best checkpoint is damaged.
    """
    best = checkpoints.best()
    if best is not None and of_first_process(_recorded(run / BEST)) != as_json(best):
        write_result(program, checkpoints.restore_state(best['step'], abstract_carry).state, run / BEST, best)


def _recorded(folder: StoragePath) -> Any:
    """Return the record of a complete result, None if there is none; on process 0 only."""
    path = folder / RECORD
    if jax.process_index() != 0 or (folder / INCOMPLETE).exists() or not path.exists():
        return None
    try:
        return parse_json(path.read_bytes(), dict[str, Any], str(path))
    except InputError:  # edited by hand; it is written again
        return None
