"""The order of the benchmark's commands, and those that run together."""

from __future__ import annotations

import pathlib
import threading

import pytest

from neodragon_jax.base.errors import InputError
from support.benchmark_evidence import chain
from train.benchmark import schedule
from train.benchmark.chain import Step
from train.benchmark.tiers import TIERS
from train.benchmark.whole_chain import WholeChain


def test_a_step_reads_only_what_earlier_steps_write(tmp_path):
    made = {tmp_path / 'prompts.txt'}
    for step in chain(tmp_path).steps():
        written = {step.result, *step.parts}
        for target, source in step.parts.items():
            assert source.parent in {path.parent for path in made} | {path.parent.parent for path in made}, source
            made.add(target / 'config.json')
        # Of a run: its folder is named by --config.workdir, of a program with options by --out.
        own = [argument.partition('=')[2] for argument in step.arguments if argument.startswith('--config.workdir=')]
        own += [step.arguments[i + 1] for i, argument in enumerate(step.arguments[:-1]) if argument == '--out']
        for argument in step.arguments:
            path = argument.partition('=')[2] if argument.startswith('--config.') else argument
            if not path.startswith(str(tmp_path)) or path in own:
                continue
            assert any(str(known).startswith(path) for known in made), (step.name, path)
        made |= written | {step.result.parent}
        made |= {step.result.parent.parent / name / 'config.json' for name in OTHER_RESULTS.get(step.name, ())}


def together(tmp_path, *seeds: int) -> list[set[str]]:
    """Return which steps may run at the same time if all take equally long."""
    chains = [WholeChain(TIERS['cpu'], tmp_path, seed) for seed in seeds]
    left = list({step.result: step for chain in chains for step in chain.steps()}.values())
    rounds = []
    while left:
        chosen = schedule.ready(left, [])
        rounds.append({f'{step.name} {step.result.relative_to(tmp_path).parts[0]}' for step in chosen})
        left = [step for step in left if step not in chosen]
    return rounds


def test_steps_run_together_where_they_do_not_wait(tmp_path):
    rounds = together(tmp_path, 0)
    names = [{name.split()[0] for name in round} for round in rounds]
    number = {name: index for index, chosen in enumerate(names) for name in chosen}
    assert names[0] == {'language', 'scenes', 'autoencoder'} and names[-1] == {'evaluation'}
    assert number['decoder'] == number['latents'] < number['teacher'] < number['text'] == number['importance']
    assert number['stage1'] < number['stage2'] and number['text'] < number['samples'] < number['student']
    assert {'student', 'regression', 'paper'} <= names[number['student']]
    both = together(tmp_path, 0, 1)
    assert sum(map(len, both)) < 2 * sum(map(len, rounds))
    assert {'teacher seed-0', 'teacher seed-1'} <= both[number['teacher']]


def step(name: str, *reads: str) -> Step:
    return Step(name, pathlib.Path(f'/x/{name}/done'), name, ['--out', f'/x/{name}', *(f'/x/{one}' for one in reads)])


def test_jobs_run_each_step_once_after_what_it_reads():
    steps = [step('a'), step('b'), step('c', 'a'), step('d', 'a', 'b/part'), step('e', 'c', 'd')]
    order: list[str] = []
    at_once = threading.Barrier(2, timeout=30)

    def run(step: Step) -> float:
        if step.name in 'cd':  # both run, or neither goes on
            at_once.wait()
        order.append(step.name)
        return 1.0

    finished: list[str] = []
    schedule.run_all(steps, 2, run, lambda step, seconds: finished.append(step.name))
    assert sorted(order) == sorted(finished) == list('abcde')
    assert set(order[:2]) == set('ab') and order[-1] == 'e'


def test_a_step_that_fails_stops_what_has_not_begun():
    def run(step: Step) -> float:
        if step.name == 'a':
            raise InputError('a is broken')
        return 1.0

    finished: list[str] = []
    with pytest.raises(InputError, match='a is broken'):
        schedule.run_all([step('a'), step('b', 'a'), step('c')], 1, run, lambda step, _: finished.append(step.name))
    assert 'b' not in finished


# Further results of a step, besides the file that marks it as done.
OTHER_RESULTS = {
    'teacher': ('diffusion_transformer_320p_multistep_t2v', 'context_adapter_multistep_t2v'),
    'text': ('text_encoder_3',),
    'text_without_cosine': ('text_encoder_3',),
    'stage1': ('pyramid_flow_dit',),
    'student': ('context_adapter',),
    'language': ('text_encoder_3', 'tokenizer', 'tokenizer_2', 'tokenizer_3', 'text_encoder', 'text_encoder_2'),
}
