"""The measured programs of the teacher's sampling: those that a generation runs, as often and of these shapes."""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.pyramid.sampler import DrawnNoise, sample
from train.aot.chips import topology
from train.aot.report import Case, Facts
from train.measure import sampler
from train.runtime.model_flops import traced_flops
from train.runtime.sharding import MeshConfig, make_mesh

BATCH = 2


@pytest.fixture(scope='module')
def mesh():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), tree)


@pytest.mark.parametrize('first_unit', [0, 1])
def test_programs_are_those_of_a_generation(first_unit, mesh):
    plan = dataclasses.replace(sampler.released_plan(), steps=(2, 1, 1), first_steps=(1, 2, 1))
    teacher = sampler.make_teacher('masked', plan, mesh)
    seen, expected = collections.Counter(), sampler.runs(plan, first_unit)
    given = {part: shapes(sampler.arguments(teacher, plan, part, BATCH)[1]) for part in expected}

    def flow(params, modulation, history, x, unit, prompt):
        del params
        stage = [16, 32, 64].index(x.shape[3])
        part = stage, not history
        seen[part] += 1
        assert shapes((modulation, history, x, unit, prompt)) == given[part][1:]
        return jnp.zeros_like(x)

    def modulate(params, pooled, timestep):
        assert timestep.shape == ()
        # The negative prompt is modulated once for all batches.
        seen[None, False] += len(pooled) == BATCH
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(compiled, abstract_params(teacher.module), pooled, timestep))

    compiled, teacher.modulate, teacher.flow = teacher.modulate, modulate, flow
    prompt = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sampler.prompts(BATCH))
    first = jnp.zeros((BATCH, 1, plan.height, plan.width, plan.channels)) if first_unit else None
    noise = DrawnNoise(jax.random.split(jax.random.key(0), BATCH))
    sample(teacher.denoiser(first_unit), plan, prompt, noise, first_frame=first)
    assert seen == expected


def test_released_plan_takes_the_steps_of_the_paper():
    plan = sampler.released_plan()
    assert (plan.frames, plan.height, plan.width) == (7, 40, 64)
    runs = sampler.runs(plan, 0)
    assert [runs[stage, True] for stage in range(3)] == [20] * 3
    assert [runs[stage, False] for stage in range(3)] == [6 * 10] * 3
    assert runs[None, False] == 3 * 20 + 3 * 10


def test_flops_are_those_of_the_formula(mesh):
    plan = sampler.released_plan()
    teacher, config = sampler.make_teacher('masked', plan, mesh), sampler.FULL.denoiser
    function, given = sampler.arguments(teacher, plan, (2, False), BATCH)
    # Query, key, value and output, two of the MLP at four times the width; scores and weighted values.
    tokens, width = 1728, config.width
    one_block = tokens * (4 + 2 * 4) * width**2 + 2 * tokens**2 * width
    # The last block leaves the text as it is; patches go in and out.
    work = 2 * (2 * BATCH) * config.num_layers * one_block
    assert 0.97 < traced_flops(function, *given) / work < 1.01


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--attention', 'splush'], 'Did you mean "splash"'),
        (['--batches', '1,0'], '--batches 1,0: write numbers from 1'),
        (['--topology', 'v5x:1x1'], 'v5x'),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    assert sampler.main(arguments) == 2
    assert message in capsys.readouterr().err


def compiled(runs: int, gib: float = 3.0) -> sampler.Compiled:
    """Return a program of 0.3 s on a v5e."""
    slice_ = topology('v5e:1x1')
    facts = Facts(
        fits=gib < slice_.chip.hbm_gib,
        needed_bytes=gib * 2**30,
        lower_s=1,
        compile_s=1,
        memory={'arguments': 1.0},
        calibrated_cycles=0.3 * slice_.chip.clock,
    )
    case = Case('sampler', '', 1.0, slice_, (1, 1, 1), BATCH, BATCH, {}, model_flops=0.15 * slice_.chip.peak_flops)
    return sampler.Compiled(case, facts, runs)


def test_row_adds_the_runs_of_every_program():
    options = sampler.Options(BATCH, 'splash', 0, '')
    parts = {(0, True): compiled(2), (0, False): compiled(5), (1, False): compiled(2), (None, False): compiled(1)}
    cells = dict(zip(sampler.COLUMNS, sampler.row(topology('v5e:1x1'), parts, options), strict=True))
    # Ten runs of 0.3 s for two videos, half of them arithmetic.
    assert cells['s a video'] == '1.50' and cells['of it modulation'] == '0.15'
    assert cells['ms of a call'] == '300 / 300' and cells['MFU %'] == '50'
    assert cells['videos per chip-hour'] == '2,400' and cells['chip-hours of 350,000'] == '146'


def test_row_of_what_does_not_fit():
    options = sampler.Options(BATCH, 'splash', 0, '')
    cells = sampler.row(topology('v5e:1x1'), {(0, False): compiled(1, gib=20)}, options)
    assert cells[3] == 'does not fit: needs 20.00 of 15.75 GiB; try fewer videos at a time' and len(cells) == len(
        sampler.COLUMNS
    )
