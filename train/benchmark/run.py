"""Running the benchmark: the commands of the chain that are not done yet, the evaluation, and the report."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from neodragon_jax.base.atomic import atomic_file, atomic_folder
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.folder_lock import folder_lock
from neodragon_jax.base.json_file import read_json
from train.benchmark import schedule
from train.benchmark.chain import Chain, Step
from train.benchmark.continuation import Continuation
from train.benchmark.cosine_term import CosineTerm
from train.benchmark.recovery import Recovery
from train.benchmark.tiers import TIERS, Tier
from train.benchmark.whole_chain import WholeChain
from train.shapes.captions import caption
from train.shapes.world import WORLDS, World

# Root of the repository. Programs run from it, because the paths of their settings are relative to it.
ROOT = pathlib.Path(__file__).resolve().parents[2]
# CPU steps are faster when their buffers are in huge pages; only Linux reads this variable.
HUGE_PAGES = 'glibc.malloc.hugetlb=1'
# Number of random wordings of every trained combination among the prompts: nearly all that exist.
WORDINGS = 400
# Seed of the order of the prompts.
PROMPTS_SEED = 0


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line; see its help.

    Attributes:
      tier: name of one of TIERS.
      start: root of a checkpoint to continue from; None trains the whole system.
    """

    out: pathlib.Path
    tier: str
    start: pathlib.Path | None
    seeds: tuple[int, ...]
    only: str | None
    until: str | None
    jobs: int
    devices: int


def run_step(step: Step, environment: dict[str, str], log: pathlib.Path) -> float:
    """Run a program, its output in a log file; return the seconds it took.

    Raises:
      InputError: it failed.
    """
    for target, source in step.parts.items():
        if not (target / _sentinel(source)).is_file():
            with atomic_folder(target) as partial:
                shutil.copytree(source, partial, dirs_exist_ok=True)
    start = time.monotonic()
    command = [sys.executable, '-m', step.module, *step.arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('a') as file:
        file.write(f'$ python -m {step.module} {shlex.join(step.arguments)}\n')
        file.flush()
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = '\n'.join(log.read_text(errors='replace').splitlines()[-15:])
        raise InputError(
            f'step {step.name} failed with status {done.returncode}; its output is in {log}. Correct '
            f'the cause and run the same command again: it continues there. The last lines:\n{tail}'
        )
    return time.monotonic() - start


def _sentinel(folder: pathlib.Path) -> str:
    """Return the name of a file that every complete component has."""
    return 'config.json' if (folder / 'config.json').is_file() else 'tokenizer_config.json'


def train(chains: Sequence[Chain], devices: int, jobs: int, until: str | None, evaluate: bool) -> None:
    """Run the commands of some chains that are not done yet.

    Args:
      until: name of the last step to run.
      evaluate: whether the evaluation is one of the steps.
    Raises:
      InputError: a command failed, or `until` names no step.
    """
    of_step: dict[pathlib.Path, tuple[Step, Chain]] = {}
    for chain in chains:
        steps = chain.steps() if evaluate else chain.steps()[:-1]
        names = [step.name for step in steps]
        if until is not None:
            if until not in names:
                raise InputError(f'--until {until}: no such step; use one of {", ".join(names)}.')
            steps = steps[: names.index(until) + 1]
        # Steps that all seeds share run once, with the first seed.
        for step in steps:
            of_step.setdefault(step.result, (step, chain))
    write_prompts(chains[0].out / 'prompts.txt', chains[0].tier)
    environment = os.environ | {
        'JAX_NUM_CPU_DEVICES': str(max(1, devices // jobs)),
        'JAX_COMPILATION_CACHE_DIR': str(chains[0].out / 'compiled'),
        'GLIBC_TUNABLES': os.environ.get('GLIBC_TUNABLES', HUGE_PAGES),
    }
    todo = [step for step, _ in of_step.values() if not step.result.is_file()]
    log = lambda step: of_step[step.result][1].folder / 'logs' / f'{step.name}.txt'
    with tqdm.tqdm(total=len(of_step), initial=len(of_step) - len(todo), unit='step', disable=None) as bar:

        def done(step: Step, seconds: float) -> None:
            chain = of_step[step.result][1]
            note_time(chain.folder / 'times.json', step.name, seconds)
            bar.update()
            bar.write(f'seed {chain.seed}, {step.name}: {seconds:.0f} s', file=sys.stdout)

        schedule.run_all(todo, jobs, lambda step: run_step(step, environment, log(step)), done)


def write_prompts(path: pathlib.Path, tier: Tier) -> None:
    """Write the trained captions in several wordings, one per line, unless the file exists."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text('\n'.join(prompts_of(WORLDS[tier.world])) + '\n')


def prompts_of(world: World) -> list[str]:
    """Return the trained captions of a world in several wordings, in rounds of one wording of every caption.

    The teacher is sampled for the first lines, so that every part of the list has to show all captions equally often.
    """
    rng = np.random.default_rng(PROMPTS_SEED)
    wordings = []
    for row, traits in enumerate(dict.fromkeys(map(world.captioned, world.combinations('train')))):
        different = list(dict.fromkeys(caption(traits, (row, wording)) for wording in range(WORDINGS)))
        wordings.append([different[index] for index in rng.permutation(len(different))])
    rounds = itertools.zip_longest(*wordings)
    return [lines[index] for lines in rounds for index in rng.permutation(len(lines)) if lines[index] is not None]


def note_time(path: pathlib.Path, name: str, seconds: float) -> None:
    """Add the seconds of a step to those of earlier attempts."""
    times = read_json(path, dict[str, float]) if path.is_file() else {}
    times[name] = times.get(name, 0.0) + seconds
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(times, indent=1) + '\n')


def run(options: Options) -> int:
    """Train, evaluate and report; return how many targets were missed.

    Raises:
      InputError: a folder or step is wrong, or a command failed.
    """
    out = options.out.resolve()
    with folder_lock(out, '-'.join(map(str, options.seeds)) if options.only == 'evaluate' else ''):
        chains = [make_chain(options.tier, out, seed, options.start) for seed in options.seeds]
        check_tier(out, f'{options.tier}, continued' if options.start else options.tier)
        if options.only in (None, 'train'):
            train(chains, options.devices, options.jobs, options.until, evaluate=options.only is None)
        if options.until is not None:
            return 0
        # Imported late, because JAX reserves the devices, which the programs need.
        from train.benchmark import evaluation, report, shipping

        if options.only == 'evaluate':
            for chain in chains:
                if not isinstance(chain, CosineTerm):
                    evaluation.evaluate(chain)
                if chain.students:
                    shipping.write(chain)
                else:
                    chain.evaluated.write_text('The evaluation is done.\n')
        missed = 0
        if options.only in (None, 'report'):
            missed = report.write(chains)
            print(f'{out / "report.md"}: {missed or "all"} targets {"missed" if missed else "reached"}')
        return missed


def make_chain(name: str, out: pathlib.Path, seed: int, start: pathlib.Path | None) -> Chain:
    """Return the commands of a seed of a tier.

    Raises:
      InputError: the tier needs a checkpoint to start from, or takes none.
    """
    tier = TIERS[name]
    if name == 'cosine' and start is not None:
        raise InputError('--start: tier cosine trains text encoders alone; leave --start out.')
    if name == 'recovery' and start is None:
        raise InputError('--tier recovery: give --start CKPT, such as moving_shapes, for its VAE and text encoders.')
    if start is None:
        return CosineTerm(tier, out, seed) if name == 'cosine' else WholeChain(tier, out, seed)
    kind = Recovery if name == 'recovery' else Continuation
    return kind(tier, out, seed, start)


def check_tier(out: pathlib.Path, name: str) -> None:
    """Record the tier of a folder, or raise InputError if the folder was begun with another tier."""
    note: Any = out / 'tier.txt'
    if note.is_file() and note.read_text().strip() != name:
        raise InputError(f'--out {out}: holds the tier {note.read_text().strip()}, not {name}; choose another folder.')
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(note) as partial:
        partial.write_text(name + '\n')
