"""Running the benchmark: the commands of the chain that are not done yet, the evaluation, and the report."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.folder_lock import folder_lock
from train.benchmark import outdated, record, schedule
from train.benchmark.chain import Chain, Step
from train.benchmark.continuation import Continuation
from train.benchmark.cosine_term import CosineTerm
from train.benchmark.programs import Programs
from train.benchmark.recovery import Recovery
from train.benchmark.tiers import TIERS, Tier
from train.benchmark.whole_chain import WholeChain
from train.shapes.captions import caption
from train.shapes.world import WORLDS, World

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
      changes: further settings of steps.
    """

    out: pathlib.Path
    tier: str
    start: pathlib.Path | None
    seeds: tuple[int, ...]
    only: str | None
    until: str | None
    jobs: int
    devices: int
    changes: record.Changes = dataclasses.field(default_factory=dict)


def train(chains: Sequence[Chain], options: Options) -> None:
    """Run the commands of some chains that are not done yet; the evaluation only if it is asked for.

    Raises:
      InputError: a command failed, or the options name no step, or settings that a step was not begun with.
    """
    of_step = _steps(chains, options)
    record.record_changes(chains, [step for step, _ in of_step.values()], options.changes)
    for chain in chains:
        outdated.adopt(chain)
    write_prompts(chains[0].out / 'prompts.txt', chains[0].tier)
    devices, jobs = options.devices, options.jobs
    environment = os.environ | {
        'JAX_NUM_CPU_DEVICES': str(max(1, devices // jobs)),
        'JAX_COMPILATION_CACHE_DIR': str(chains[0].out / 'compiled'),
        'GLIBC_TUNABLES': os.environ.get('GLIBC_TUNABLES', HUGE_PAGES),
    }
    todo = missing(of_step)
    programs = Programs(environment)
    bar = tqdm.tqdm(total=len(of_step), initial=len(of_step) - len(todo), unit='step', disable=None)
    with programs.stopped_by_signals(), bar:

        def done(step: Step, seconds: float) -> None:
            bar.update()
            bar.write(f'seed {of_step[step.result][1].seed}, {step.name}: {seconds:.0f} s', file=sys.stdout)

        schedule.run_all(todo, jobs, lambda step: programs.run(step, of_step[step.result][1].folder), done)


def _steps(chains: Sequence[Chain], options: Options) -> dict[pathlib.Path, tuple[Step, Chain]]:
    """Return the steps of some chains in order, by their result; steps that all seeds share are of the first."""
    of_step: dict[pathlib.Path, tuple[Step, Chain]] = {}
    for chain in chains:
        steps = record.changed(chain.steps(), options.changes)
        steps = steps if options.only is None else steps[:-1]
        names = [step.name for step in steps]
        if options.until is not None:
            if options.until not in names:
                raise InputError(f'--until {options.until}: no such step; use one of {", ".join(names)}.')
            steps = steps[: names.index(options.until) + 1]
        for step in steps:
            of_step.setdefault(step.result, (step, chain))
    return of_step


def missing(of_step: Mapping[pathlib.Path, tuple[Step, Chain]]) -> list[Step]:
    """Return the steps without a result, and the evaluations whose results are not of what is there, or will be.

    The call that trained a system may have ended before its evaluation.

    Args:
      of_step: result -> its step and the chain of its seed, in order.
    """
    absent = {result for result in of_step if not result.is_file()}

    def is_missing(step: Step, chain: Chain) -> bool:
        if step.result in absent or absent & set(step.after):
            return True
        is_evaluation = bool(step.after)
        return is_evaluation and bool(outdated.due(outdated.identities(chain), outdated.read_results(chain)))

    return [step for step, chain in of_step.values() if is_missing(step, chain)]


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


def run(options: Options) -> int:
    """Train, evaluate and report; return how many targets were missed.

    Raises:
      InputError: a folder or step is wrong, or a command failed.
    """
    out = options.out.resolve()
    with folder_lock(out, '-'.join(map(str, options.seeds)) if options.only == 'evaluate' else ''):
        chains = [make_chain(options.tier, out, seed, options.start) for seed in options.seeds]
        record.check_tier(out, options.tier, options.start)
        if options.only in (None, 'train'):
            train(chains, options)
        if options.until is not None:
            return 0
        # Imported late, because JAX reserves the devices, which the programs need.
        from train.benchmark import evaluation, report, shipping

        if options.only == 'evaluate':
            for chain in chains:
                # First: an evaluation whose results are of what is there is not repeated, nor this with it.
                if chain.students:
                    shipping.write(chain)
                if not isinstance(chain, CosineTerm):
                    evaluation.evaluate(chain)
                if not chain.students:
                    chain.evaluated.write_text('The evaluation is done.\n')
        missed = 0
        if options.only in (None, 'report'):
            missed = report.write(chains)
            print(f'{out / "report.md"}: {missed or "all"} targets {"missed" if missed else "reached"}')
        return missed


def make_chain(name: str, out: pathlib.Path, seed: int, start: pathlib.Path | None) -> Chain:
    """Return the commands of a seed of a tier.

    Raises:
      InputError: the tier needs a checkpoint to start from, or takes none, or none of that kind.
    """
    tier = TIERS[name]
    if name == 'cosine' and start is not None:
        raise InputError('--start: tier cosine trains text encoders alone; leave --start out.')
    if name == 'recovery' and start is None:
        raise InputError('--tier recovery: give --start CKPT, such as moving_shapes, for its VAE and text encoders.')
    if start is None:
        return CosineTerm(tier, out, seed) if name == 'cosine' else WholeChain(tier, out, seed)
    record.check_start(name, tier, start)
    kind = Recovery if name == 'recovery' else Continuation
    return kind(tier, out, seed, start)
