"""Sizing for TPUs: slices, arithmetic counted from traces, estimates, abstract programs, and one real compilation."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gzip
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import dmd as dmd_config
from configs import teacher as teacher_config
from neodragon_jax.base.errors import InputError
from support.goldens import TINY_CHECKPOINT
from support.sizing_cases import FITS, GIB, ON_V5E, case, tiny_settings
from train import tpu_flags
from train.aot import chips as aot_chips
from train.aot import compilation, jobs
from train.aot import report as aot_report
from train.aot import sizing as aot
from train.aot.report import Facts
from train.dmd import teacher as dmd_teacher
from train.flow.unused import Unused
from train.runtime import runner
from train.runtime.model_flops import traced_flops
from train.runtime.step import variants

# Slices.


def test_names_of_slices():
    slice_ = aot_chips.topology('v5p:2x2x4')
    assert (slice_.chips, slice_.devices, slice_.shape) == (16, 16, (2, 2, 4))
    assert aot_chips.topology('tpu7x:2x2x1').devices == 8
    assert aot_chips.topology('v5e:1x1').options() == {'chips_per_host_bounds': (1, 1, 1)}
    assert aot_chips.topology('v4:2x2x1').options() == {'chip_config_name': 'megacore'}
    for wrong in ('v5e:3x3', 'v5p-8', 'v5e-16', 'ironwood', ''):
        with pytest.raises(InputError, match=r'no such slice.*v6e: 1x1 2x2') as error:
            aot_chips.topology(wrong)
        assert '\n' not in str(error.value)


def test_clocks_are_those_of_the_chips():
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in aot_chips.CHIPS.items()}
    assert clocks == {'v4': 1.05, 'v5e': 1.5, 'v5p': 1.75, 'v6e': 1.75, 'tpu7x': 2.2}


@pytest.mark.parametrize(
    ('name', 'places', 'links'),
    [
        ('v5e:4x4', [(x, y, 0) for x in range(4) for y in range(4)], 2),  # a corner has two neighbors
        ('v5e:4x4', [(x, 0, 0) for x in range(4)], 1),
        ('v5e:16x16', [(x, 0, 0) for x in range(16)], 2),  # a ring
        ('v5e:16x16', [(x, 0, 0) for x in range(8)], 1),  # half of it is a line
        ('v5p:4x4x4', [(x, y, 0) for x in range(4) for y in range(4)], 4),
        ('v5p:2x2x4', [(0, 0, z) for z in range(4)], 1),  # less than a cube has no rings
        ('tpu7x:2x2x1', [(0, 0, 0), (0, 0, 0)], 1),
    ],
)
def test_rate_of_a_group_is_that_of_its_worst_placed_device(name, places, links):
    slice_ = aot_chips.topology(name)
    assert slice_.bandwidth(places) == links * slice_.chip.link_bytes


# Arithmetic of a trace.


def test_traced_flops_of_a_scan_forward_and_backward():
    def loss(w, x, recompute):
        layer = lambda x, w: (jnp.tanh(x @ w), None)
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if recompute else layer, x, w)[0])

    w, x = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
    product = 2 * 8 * 16 * 16
    assert traced_flops(functools.partial(loss, recompute=False), w, x) == 5 * product
    # The gradient of the input is unused, but the first layer's is dropped only outside a scan.
    assert traced_flops(jax.grad(functools.partial(loss, recompute=False)), w, x) == 3 * 5 * product
    assert traced_flops(jax.grad(functools.partial(loss, recompute=True)), w, x) == 4 * 5 * product


def test_traced_flops_of_a_convolution_a_branch_and_what_nobody_reads():
    def function(x, kernel, flag):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
        unread = x[0, :, :, 0] @ x[0, :, :, 0]
        del unread
        return jax.lax.cond(flag, lambda y: y.reshape(64, 5) @ jnp.ones((5, 7)), lambda y: jnp.zeros((64, 7)), y)

    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    got = traced_flops(function, shape(1, 8, 8, 3), shape(3, 3, 3, 5), jax.ShapeDtypeStruct((), jnp.bool_))
    assert got == 2 * 64 * 5 * (3 * 3 * 3) + 2 * 64 * 5 * 7


def denoiser_flops(config, image: int, keep: int, text: int) -> float:
    """Return the FLOPs of a forward pass, counted from the paper's architecture."""
    width, blocks, tokens = config.width, config.num_layers - 1, image + text
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    # Only the image rows of the last block are used, so its text queries are dropped.
    last = 2 * width**2 * (10 * keep + 2 * image + 2 * text) + 4 * keep * tokens * width
    modulation = 2 * width**2 * (12 * blocks + 8 + 2)
    embeddings = 2 * (256 + config.pooled_projection_dim) * width + 2 * 2 * width**2
    return blocks * block + last + modulation + embeddings + 2 * (image + keep) * config.patch_dim * width


def test_denoiser_as_traced_is_the_denoiser_on_paper():
    teacher = dmd_teacher.abstract_teacher('')
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    latents = [shape(1, 1, 10, 16, 16)] * 4 + [shape(1, 1, 20, 32, 16)] + [shape(1, 1, 40, 64, 16)] * 2
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    apply = lambda params, *inputs: teacher.module.clone(scan=True).apply({'params': params}, *inputs)
    got = traced_flops(apply, teacher.params, latents, shape(1, 128, 1536), ids, shape(1, 2048), shape(1))
    # The trace resizes the positional table by products, too.
    assert got == pytest.approx(denoiser_flops(teacher.module.config, image=1600, keep=640, text=128), rel=1e-4)
    assert got == pytest.approx(2.03e12, rel=1e-3)


# Abstract programs.


def test_abstract_program_has_the_shapes_of_the_real_one():
    abstract = runner.size('dmd', tiny_settings())
    real = dmd_teacher.read_teacher(str(TINY_CHECKPOINT))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), tree)
    assert shapes(abstract.program.frozen()['teacher']) == shapes(real.params)
    assert abstract.program.module == dmd_teacher.abstract_teacher(str(TINY_CHECKPOINT)).module.clone(
        scan=True, dtype=abstract.program.module.dtype
    )
    sample = abstract.source[0]
    assert sample['latents'].shape == (3, 8, 8, 16) and sample['text'].shape == (128, 64)
    assert abstract.run.updates == 3


def test_abstract_program_lowers_without_memory():
    abstract = runner.size('dmd', dmd_config.get_config('full'))
    state = jax.eval_shape(abstract.program.init_state, jax.random.key(0), abstract.program.frozen())
    assert sum(leaf.size for leaf in jax.tree.leaves(state.student)) > 1.5e9
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract.program.frozen()))
    assert sum(variants(abstract.program).values()) == pytest.approx(1)


def test_unknown_programs_are_refused():
    with pytest.raises(InputError, match='there is no train/nothing'):
        runner.size('nothing', ConfigDict())
    with pytest.raises(InputError, match='there is no train/flow/program'):
        runner.size('flow', ConfigDict())
    assert runner.program_name('configs/dmd.py:tiny') == 'dmd'


# Jobs.


@pytest.fixture
def quick(monkeypatch):
    """Counting arithmetic takes seconds; the jobs need only which variant has most."""
    counted = lambda program, settings, batch_size: {stage: (stage + 1.0) * batch_size for stage in range(3)}
    monkeypatch.setattr(jobs, 'model_flops', counted)


def test_jobs_of_a_sweep(quick):
    options = jobs.Options(
        ('v5e:2x2', 'v5p:2x2x2'),
        meshes=((1, -1, 1), (-1, 2, 1)),
        batches=(1, 4),
        choices=(('remat', ('full', 'dots')), ('attention', ('splash',))),
    )
    made = jobs.make_jobs('dmd', tiny_settings(), options)
    assert len(made) == 2 * 2 * 2 * 2
    cases = [job.case for job in made]
    assert {case.mesh for case in cases} == {(1, 4, 1), (2, 2, 1), (1, 8, 1), (4, 2, 1)}
    assert {case.options['remat'] for case in cases} == {'full', 'dots'}
    assert all(case.options['attention'] == 'splash' and case.variant == '2' for case in cases)
    assert all(case.per_device in (1, 4) and case.samples == 3 * case.batch_size for case in cases)
    assert all(job.settings.loop.batch_size == job.case.batch_size for job in made)
    assert all(job.settings.dmd.remat == job.case.options['remat'] for job in made)
    assert cases[0].model_flops == 3.0 * cases[0].batch_size
    # The run is that of the settings, whatever batch is sized.
    loop_settings = tiny_settings().loop
    assert {case.run_samples for case in cases} == {3 * loop_settings.steps * loop_settings.batch_size}


def test_settings_are_checked_with_the_batch_that_is_sized(quick):
    settings = tiny_settings()
    own_batch = settings.loop.batch_size
    settings.dmd.own_history.update(first=0.5, last=0.5, videos=2 * own_batch)
    options = jobs.Options(('v5e:2x2',), meshes=((1, -1, 1),), batches=(own_batch,))
    (job,) = jobs.make_jobs('dmd', settings, options)
    assert job.case.batch_size == 4 * own_batch
    assert job.case.run_samples == 3 * settings.loop.steps * own_batch
    with pytest.raises(InputError, match=r'own_history\.videos'):
        jobs.make_jobs('dmd', settings, jobs.Options(('v5e:1x1',), meshes=((1, 1, 1),), batches=(own_batch,)))


@pytest.mark.parametrize(('program', 'configs'), [('dmd', dmd_config), ('teacher', teacher_config)])
def test_attention_is_that_of_tpus(monkeypatch, program, configs):
    monkeypatch.setattr(jobs, 'model_flops', lambda *_: collections.defaultdict(float))
    settings = configs.get_config('tiny')
    settings[program].update(remat='kernel', attention='auto')
    if program == 'dmd':
        settings.checkpoint = str(TINY_CHECKPOINT)
    made = jobs.make_jobs(program, settings, jobs.Options(('v5e:2x2',), variant=jobs.ALL, batches=(1,)))
    assert [job.case.options for job in made] == [{'remat': 'kernel', 'attention': 'splash'}] * len(made) != []
    # Short histories are padded in every stage.
    assert all(0 < job.case.unused.padding < 1 and 0 < job.case.unused.masked < 1 for job in made)


def test_jobs_of_the_settings_as_they_stand(quick, capsys):
    (job,) = jobs.make_jobs('dmd', tiny_settings(batch_size=6), jobs.Options(('v5e:2x2',), variant='1'))
    assert job.case.mesh == (4, 1, 1) and job.case.batch_size == 8
    assert 'does not divide over 4 devices; sizing 8' in capsys.readouterr().err
    assert len(jobs.make_jobs('dmd', tiny_settings(), jobs.Options(('v5e:2x2',), variant='all'))) == 3


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (jobs.Options(('v5e:9x9',)), 'no such slice'),
        (jobs.Options(('v5e:2x2',), variant='7'), 'use 0, 1, 2, largest or all'),
        (jobs.Options(('v5e:2x2',), meshes=((3, 1, 1),)), 'not one over the 4 devices'),
        (jobs.Options(('v5e:2x2',), choices=(('remat', ('some',)),)), 'remat'),
        (jobs.Options(('v5e:2x2',), choices=(('color', ('red',)),)), 'no setting "color"'),
    ],
)
def test_wrong_options_are_refused(quick, options, message):
    with pytest.raises(InputError, match=message):
        jobs.make_jobs('dmd', tiny_settings(), options)


def test_model_flops_know_no_recomputation():
    settings = tiny_settings()
    settings.dmd.update(remat='full', attention='splash')
    flops = jobs.model_flops('dmd', settings, batch_size=1)
    config = dmd_teacher.abstract_teacher(str(TINY_CHECKPOINT)).module.config
    # Two calls forward and backward and eight forward, of the envelope of units 0..2 on a grid of 4 x 4 patches.
    forward = denoiser_flops(config, image=1 + 1 + 1, keep=1, text=128)
    assert flops[0] == pytest.approx(14 * forward, rel=0.02)
    assert flops[0] < flops[1] < flops[2]


@pytest.mark.long
def test_model_flops_count_roll_outs_to_their_last_unit(monkeypatch):
    monkeypatch.setattr(jobs, 'variants', lambda program: [0])
    settings = tiny_settings()
    (alone,) = jobs.model_flops('dmd', settings, batch_size=1).values()

    def rolled(batch_size: int, videos: int) -> float:
        """Return the FLOPs of own histories."""
        settings.dmd.own_history.update(first=0.5, last=0.5, videos=videos)
        (with_videos,) = jobs.model_flops('dmd', settings, batch_size).values()
        return with_videos - batch_size * alone

    config = dmd_teacher.abstract_teacher(str(TINY_CHECKPOINT)).module.config
    forward = denoiser_flops(config, image=1 + 1 + 1, keep=1, text=128)
    two = rolled(4, videos=2)
    # In all stages, whatever the batch.
    assert two == pytest.approx(rolled(2, videos=2), rel=1e-6)
    assert rolled(4, videos=4) == pytest.approx(2 * two, rel=1e-4)
    assert two > 2 * (settings.blank_sample.frames - 1) * 3 * forward


# Estimates.


def test_estimate():
    times = aot_report.estimate(case(), FITS)
    # 1.5e9 calibrated cycles at 1.5 GHz (to three digits); the kernel at its share of the peak; links as given.
    assert times.compute_s == pytest.approx(1.0, rel=3e-3)
    assert times.kernels_s == pytest.approx(0.5)
    assert times.communication_s == pytest.approx(0.4)
    assert times.step_s == pytest.approx((1.5, 1.9), rel=3e-3)
    assert times.mfu == pytest.approx((100 / 197 / 1.5, 100 / 197 / 1.9), rel=3e-3)
    assert times.samples_per_s == pytest.approx((96 / 1.5, 96 / 1.9), rel=3e-3)
    assert times.communication_share == pytest.approx(0.4 / 1.9, rel=3e-3)
    # 1,000 such steps on 16 chips.
    assert times.chip_hours(case(run_samples=96_000)) == pytest.approx((16e3 * 1.5 / 3600, 16e3 * 1.9 / 3600), rel=3e-3)
    on_v6e = aot_report.estimate(case(topology=aot_chips.topology('v6e:4x4')), FITS)
    assert on_v6e.kernels_s == pytest.approx(0.5 * ON_V5E[0] / aot_chips.CHIPS['v6e'].attention[0] * 197 / 918)
    backward = dataclasses.replace(FITS, kernels={'splash_mha_dkv.3': (18, ON_V5E[1] * 197e12)})
    assert aot_report.estimate(case(), backward).kernels_s == pytest.approx(1.0)
    assert aot_report.estimate(case(), backward, (1.0, 2 * ON_V5E[1])).kernels_s == pytest.approx(0.5)
    bound = dataclasses.replace(FITS, collectives=[('all-gather', 'fsdp', 3e12, 30.0)])
    assert aot_report.estimate(case(), bound).step_s[0] == 30.0


@pytest.mark.parametrize(
    ('message', 'sizes'),
    [
        (
            'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (260.00G) '
            'exceeds available HBM (15.75G).',
            (260 * GIB, 15.75 * GIB),
        ),
        (
            'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.94G of 15.75G hbm. Exceeded hbm '
            'capacity by 5.19G.',
            (20.94 * GIB, 15.75 * GIB),
        ),
        ('INTERNAL: Mosaic failed to compile', None),
    ],
)
def test_message_of_exhausted_memory(message, sizes):
    got = aot_report.needed_bytes(message)
    assert got == sizes or got == pytest.approx(sizes)


def test_report_and_table():
    whole = case(run_samples=96_000, unused=Unused(padding=0.07, masked=0.056))
    report, kernel = aot_report.text(whole, FITS), FITS.kernels['splash_mha_fwd'][1]
    assert '7.0% of the model FLOPs are padding of short histories, 5.6% masked scores' in report
    assert '(21% communication)' in report and '6.7 to 8.4 chip-hours for the 96,000 samples' in report
    assert 'unused' not in aot_report.text(case(), FITS)
    ratio = f'{(110e12 + kernel) / 100e12:.2f} times'
    for expected in ('4.00 of 15.75 GiB', ratio, 'all-gather', '40.000 GB received', f'{ON_V5E[0]:.1%}', 'MFU'):
        assert expected in report, expected
    full = Facts(fits=False, needed_bytes=20.5 * GIB, lower_s=1, compile_s=2)
    assert 'does not fit: needs 20.50 of 15.75 GiB' in aot_report.text(case(), full)
    slower = dataclasses.replace(FITS, calibrated_cycles=3e9)
    table = aot_report.table([(case(), slower), (case(batch_size=64), FITS), (case(), full)])
    rows = table.splitlines()[2:]
    assert '**' not in rows[0] and rows[1].count('**') >= 20 and 'needs 20.50 of 15.75' in rows[2]
    assert all(line.count('|') == len(aot_report.COLUMNS) + 1 for line in table.splitlines())
    assert aot_report.best([(case(), full)]) == set()


@pytest.mark.parametrize(('gib', 'fits'), [(15.7, True), (15.8, False)])
def test_a_compiled_program_that_is_too_large_does_not_fit(gib, fits, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, 'PACKAGES', ('jax',))
    lowered, slice_ = types.SimpleNamespace(as_text=lambda: 'text'), aot_chips.topology('v5e:1x1')
    key = compilation._key('text', slice_, {})
    compiled = dataclasses.replace(FITS, needed_bytes=gib * GIB)
    (tmp_path / f'{key}.json').write_text(json.dumps(dataclasses.asdict(compiled)))
    with gzip.open(tmp_path / f'{key}.hlo.gz', 'wt') as file:
        file.write('HloModule m\n\nENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2]{0} parameter(0)\n}\n')
    facts = compilation.facts_of(lowered, types.SimpleNamespace(devices=np.array([])), slice_, {}, tmp_path, 1)
    assert facts.fits is fits
    report = aot_report.text(case(), dataclasses.replace(FITS, fits=facts.fits, needed_bytes=facts.needed_bytes))
    assert 'MFU' in report and ('does not fit: needs 15.80 of 15.75 GiB; try a smaller batch' in report) is not fits


def test_mean_of_variants_weighs_their_shares():
    halves = [(case(share=0.25), FITS), (case(share=0.75), dataclasses.replace(FITS, calibrated_cycles=3e9))]
    line = aot.mean_of_variants(halves)
    assert line.startswith('all steps  2.2') and 'samples/day' in line


def test_flags_are_one_list(capsys):
    tpu_flags.main([])
    printed = capsys.readouterr().out.split()
    assert printed == [f'--{name}={value}' for name, value in tpu_flags.FLAGS.items()]
    assert dict(jobs.Options(('v5e:2x2',)).flags) == tpu_flags.FLAGS


# The real thing.


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed: pip install .[tpu]')
def test_step_compiles_for_a_slice(tmp_path, quick):
    """The step of the miniature distillation, for four chips; the second time it comes from the cache."""
    options = jobs.Options(('v5e:2x2',), batches=(2,), variant='0', cache=str(tmp_path))
    settings = tiny_settings()
    settings.dmd.update(fake_updates=1)
    (job,) = jobs.make_jobs('dmd', settings, options)
    facts = aot.compile_job(job, options)
    assert facts.fits and facts.cycles > 0 and not facts.unknown
    assert {kind for kind, *_ in facts.collectives} >= {'all-reduce'}
    record = next(tmp_path.glob('*.json'))
    stamp = record.stat().st_mtime_ns
    assert aot.compile_job(job, options) == facts
    assert record.stat().st_mtime_ns == stamp
