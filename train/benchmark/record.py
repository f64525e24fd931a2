"""What a folder of the benchmark was made with: its tier, the checkpoint it started from, and changed settings.

    OUT/tier.txt        the tier; of a continuation also `start: FINGERPRINT PATH`, which older versions left out
    OUT/settings.json   folder of a step, such as seed-0/stage2 -> further settings of its program

Another tier or start is refused, and so are other settings of a step that has begun.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence

from absl import flags
from ml_collections import config_flags

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.base.json_file import read_json
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.generation import defaults as generation
from train.benchmark import schedule
from train.benchmark.chain import Chain, Step
from train.benchmark.tiers import Tier
from train.runtime.settings_file import check_command_line

TIER, SETTINGS = 'tier.txt', 'settings.json'
START = 'start: '
# Root of the repository. Programs run from it, because the paths of their settings are relative to it.
ROOT = pathlib.Path(__file__).resolve().parents[2]

# Name of a step -> further settings of its program.
Changes = Mapping[str, Sequence[str]]


def check_tier(out: pathlib.Path, name: str, start: pathlib.Path | None = None) -> None:
    """Record tier and start of a folder; a folder that older versions began without the start keeps its record.

    Raises:
      InputError: the folder was begun with another tier, or from another checkpoint.
    """
    note = out / TIER
    wanted = f'{name}, continued' if start else name
    lines = note.read_text().splitlines() if note.is_file() else []
    if lines and lines[0] != wanted:
        raise InputError(f'--out {out}: holds the tier {lines[0]}, not {wanted}; choose another folder.')
    made = [f'{START}{identity(start)} {start}'] if start else []
    if lines[1:] and made and lines[1].split(' ')[1] != made[0].split(' ')[1]:
        began = lines[1].removeprefix(START).partition(' ')[2]
        raise InputError(
            f'--start {start}: {out} was begun from another checkpoint, {began}; choose another --out, or that --start.'
        )
    if not lines:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(note) as partial:
            partial.write_text('\n'.join([wanted, *made]) + '\n')


def identity(root: pathlib.Path) -> str:
    """Return a short SHA-256 of the components of a checkpoint; copying or moving the checkpoint keeps it."""
    digest = hashlib.sha256()
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith('.')):
        digest.update(f'{folder.name} {fingerprint(folder)}\n'.encode())
    return digest.hexdigest()[:16]


def recorded_start(out: pathlib.Path) -> str:
    """Return fingerprint and path of the checkpoint that a folder was begun from; '' if there is no record."""
    lines = (out / TIER).read_text().splitlines() if (out / TIER).is_file() else []
    return lines[1].removeprefix(START) if lines[1:] else ''


def check_start(name: str, tier: Tier, start: pathlib.Path) -> None:
    """Raise InputError if a checkpoint is of another world or size than a tier takes."""
    defaults = generation.read(start)
    if not defaults.world:
        raise InputError(
            f'--start {start}: its {generation.FILE} does not name the world of its training. Give a checkpoint of '
            f'train.benchmark; to one of an older version add its world, such as "world": "{tier.starts[0]}".'
        )
    if defaults.world not in tier.starts:
        wanted = ' or '.join(tier.starts)
        raise InputError(f'--start {start}: is of world {defaults.world}; tier {name} continues from {wanted}.')
    if (defaults.height, defaults.width) != (tier.height, tier.width):
        raise InputError(
            f'--start {start}: makes videos of {defaults.height}x{defaults.width}; tier {name} has '
            f'{tier.height}x{tier.width}. Give a checkpoint of that size.'
        )


def read_changes(given: Sequence[str]) -> Changes:
    """Return the settings of `--set STEP:--config.NAME=VALUE` by step.

    Raises:
      InputError: one has another form.
    """
    changes: dict[str, list[str]] = {}
    for text in given:
        step, colon, setting = text.partition(':')
        if not (step and colon and setting.startswith('--config.') and '=' in setting):
            raise InputError(f'--set {text}: write STEP:--config.NAME=VALUE, such as stage2:--config.loop.steps=5000.')
        changes.setdefault(step, []).append(setting)
    return changes


def changed(steps: Sequence[Step], changes: Changes) -> list[Step]:
    """Return the steps with changed settings.

    Raises:
      InputError: there is no such training or setting.
    """
    trainings = [step.name for step in steps if is_training(step)]
    for name in changes:
        if name not in trainings:
            hint = did_you_mean(name, trainings)
            raise InputError(f'--set {name}: no such training.{hint} Use one of {", ".join(trainings)}.')
    made = []
    for step in steps:
        more = list(changes.get(step.name, ()))
        made.append(step._replace(arguments=[*step.arguments, *more]))
        if more:
            _check_settings(made[-1], more)
    return made


def _check_settings(step: Step, more: Sequence[str]) -> None:
    """Raise InputError if a program does not know a setting; the program itself would say so hours later."""
    values = flags.FlagValues()
    file = ROOT / step.arguments[0].removeprefix('--config=')
    given = [step.module, f'--config={file}', *step.arguments[1:]]
    try:
        check_command_line(given, str(file))
        config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=given)
        values(given)
    except (flags.Error, InputError) as error:
        said = ' '.join(str(error.args[0] if error.args else error).split())
        raise InputError(f'--set {step.name}:{shlex.join(more)}: {said}') from None


def record_changes(chains: Sequence[Chain], steps: Sequence[Step], changes: Changes) -> None:
    """Record the changed settings of the steps to run, which are in order.

    Raises:
      InputError: a step has begun with other settings, or a step of any seed that reads its result is done.
    """
    out, every = chains[0].out, _steps_of_all_seeds(chains)
    path = out / SETTINGS
    recorded = recorded_changes(out)
    kept = {}
    for step in (step for step in steps if is_training(step)):
        folder = _folder_of(step)
        key, given = str(folder.relative_to(out)), list(changes.get(step.name, ()))
        before, begun = recorded.pop(key, []), folder.exists()
        if begun and before != given and (given or not step.result.is_file()):
            had = shlex.join(before) if before else 'unchanged settings'
            raise InputError(
                f'{folder}: was begun with {had}; --set has to say the same. To try other settings, copy {out} without '
                f'{key} and what was made from it.'
            )
        # A training that has begun goes on as it was begun and ends with the result that its readers had.
        if (given or not begun) and not step.result.is_file():
            _check_readers(every, step)
        if settings := before if begun else given:
            kept[key] = settings
    if kept or path.is_file():
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(recorded | kept, indent=1) + '\n')


def is_training(step: Step) -> bool:
    """Return whether a step is a program with settings."""
    return step.arguments[0].startswith('--config=')


def _folder_of(step: Step) -> pathlib.Path:
    return next(pathlib.Path(value) for name, value in schedule.options(step) if name in schedule.OUTPUT)


def recorded_changes(out: pathlib.Path) -> dict[str, list[str]]:
    """Return the recorded settings of a folder, by the folder of the step."""
    path = out / SETTINGS
    return read_json(path, dict[str, list[str]]) if path.is_file() else {}


def _steps_of_all_seeds(chains: Sequence[Chain]) -> list[Step]:
    """Return the steps of all seeds of a folder, in order: those of other seeds read the shared steps, too."""
    first, seeds = chains[0], {chain.seed: chain for chain in chains}
    for folder in sorted(first.out.glob('seed-*')):
        number = folder.name.removeprefix('seed-')
        if number.isdecimal():
            seeds.setdefault(int(number), dataclasses.replace(first, seed=int(number)))
    return list({step.result: step for chain in seeds.values() for step in chain.steps()}.values())


def _check_readers(steps: Sequence[Step], begun: Step) -> None:
    """Raise InputError if a step is done that reads the result of one which is not; evaluations are renewed."""
    stale = [begun]
    later = itertools.dropwhile(lambda step: step.result != begun.result, steps)
    for step in itertools.islice(later, 1, None):
        if not step.after and any(schedule.waits_for(step, one) for one in stale):
            stale.append(step)
    done = [str(_folder_of(step)) for step in stale[1:] if step.result.is_file()]
    if done:
        raise InputError(
            f'{_folder_of(begun)}: has no result, but these were made from an earlier one; bring that back, or remove '
            f'them: {", ".join(done)}.'
        )
