"""Tests of sessions: parameters in bfloat16, one module in memory at a time, profiles, several processes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.params import cast
from neodragon_jax.generation import first_frame, phases, pipeline
from neodragon_jax.generation.devices import Spread
from neodragon_jax.generation.jobs import make_jobs
from neodragon_jax.generation.param_store import Store
from neodragon_jax.generation.phases import finish, in_step
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.generation.session import Session
from neodragon_jax.pyramid.sampler import DrawnNoise, Prompt, sample
from support.goldens import TINY_CHECKPOINT, relative_error
from support.sessions import clips, make, open_session, plain_clip, plain_session, write_video


@functools.cache
def narrow_session() -> Session:
    """A session in bfloat16, none of whose parameters was on a device before it was cast."""
    original = Spread.replicate

    def place(self: Spread, leaf: Any) -> Any:
        assert isinstance(leaf, np.ndarray)
        return original(self, leaf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spread, 'replicate', place)
        return open_session('--dtype', 'bfloat16')


# --- bfloat16 ----------------------------------------------------------------------------------------------------


def test_cast_keeps_what_is_small_or_sensitive():
    _, params = checkpoint.load(TINY_CHECKPOINT / 'diffusion_transformer_320p')
    flat: Mapping[Any, Any] = traverse_util.flatten_dict(cast(params, jnp.bfloat16))
    kept = {'/'.join(path) for path, leaf in flat.items() if leaf.dtype == np.float32 and leaf.ndim > 1}
    assert kept == {
        'positions',
        *(f'{name}_embed/linear_{i}/kernel' for name in ('time', 'pooled') for i in (1, 2)),
        # Biases of the modulation, shaped like its several vectors.
        *('/'.join(path) for path in flat if path[-1] == 'bias' and flat[path].ndim > 1),
    }
    assert flat['blocks_0', 'image_query', 'kernel'].dtype == jnp.bfloat16
    assert flat['modulators_0', 'image', 'linear', 'kernel'].dtype == jnp.bfloat16
    assert flat['blocks_0', 'image_query_norm', 'scale'].dtype == np.float32
    assert all(isinstance(leaf, np.ndarray) for leaf in flat.values())


def test_cast_never_widens():
    narrow = {'kernel': np.ones((2, 2), np.float16)}
    assert cast(narrow, jnp.float32)['kernel'].dtype == np.float16
    assert cast(narrow, jnp.bfloat16)['kernel'].dtype == jnp.bfloat16
    assert cast(narrow, None) is narrow
    assert cast(narrow, jnp.bfloat16, keep=lambda path, leaf: True)['kernel'].dtype == np.float16


def test_all_of_the_program_holds_bfloat16():
    narrow, wide = narrow_session().loaded.store.sizes, plain_session().loaded.store.sizes
    assert set(narrow) == set(wide) and len(narrow) == 7
    for name in (pipeline.TEXT_ENCODERS, pipeline.VIDEO_ENCODER, first_frame.TEXT_ENCODERS):
        assert 0.5 <= narrow[name] / wide[name] < 0.6, name
    # Narrow layers make the kept parts of these miniatures large.
    for name in (pipeline.DENOISER, first_frame.UNET, pipeline.VIDEO_DECODER, first_frame.DECODER):
        assert 0.5 <= narrow[name] / wide[name] < 0.75, name


def test_denoiser_in_bfloat16():
    """Measured: relative error 0.007."""
    workers = plain_session(), narrow_session()
    prompt = workers[0].loaded.components.encode_prompt(['a cat'])
    history, x = (jax.random.normal(jax.random.key(i), (1, 1, 8, 16, 16)) for i in (0, 1))
    inputs = [[history], x, jnp.ones(1, jnp.int32), prompt, jnp.full(1, 386.0)]
    want, got = (worker.loaded.components.denoise(2, *worker.loaded.spread.shard(inputs)) for worker in workers)
    assert 1e-5 < relative_error(got, want) < 0.02


def test_every_step_is_told():
    """The progress bar ends at 100%: the first frame's four steps, then the denoiser's, then one per latent frame."""
    worker, told = plain_session(), []
    list(worker.make(['a cat'], [0], told.append))
    assert len(told) == worker.steps
    assert told == ['first frame'] * 4 + ['denoising'] * worker.calls + ['decoding'] * worker.plan.frames


@pytest.mark.long
def test_video_in_bfloat16():
    """The whole program, first frame included. Measured: PSNR 44.8 dB."""
    got = clips(narrow_session(), ['a cat'])[0].frames
    error = np.mean((got.astype(float) - plain_clip().astype(float)) ** 2)
    assert error > 0
    assert 10 * np.log10(255**2 / error) > 40


# --- one module at a time ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_low_memory_makes_the_same_videos_and_loads_each_module_once():
    read: list[str] = []
    worker = open_session('--low-memory')
    assert not worker.loaded.store.sizes, 'loaded before it was needed'
    original = Store.read_module

    def spy(self: Store, name: str, reader: Any) -> Any:
        assert not self._held, 'another module is still in memory'
        read.append(name)
        return original(self, name, reader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, 'read_module', spy)
        got = clips(worker, ['a cat', 'a dog'])
    assert read == [
        first_frame.TEXT_ENCODERS,
        first_frame.UNET,
        first_frame.DECODER,
        pipeline.TEXT_ENCODERS,
        pipeline.VIDEO_ENCODER,
        pipeline.DENOISER,
        pipeline.VIDEO_DECODER,
    ]
    np.testing.assert_array_equal(got[0].frames, plain_clip())
    assert np.any(got[1].frames != plain_clip())


def test_tasks_in_step():
    log: list[str] = []

    def task(name: str) -> phases.Task[str]:
        log.append(f'{name}1')
        yield jnp.ones(1)
        log.append(f'{name}2')
        return name

    results = in_step([task('a'), task('b')])
    assert next(results) == 'a' and log == ['a1', 'b1', 'a2'], 'the last phase is not one by one'
    assert list(results) == ['b'] and log[-1] == 'b2'
    assert finish(task('c')) == 'c'


# --- profile -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_profile_of_every_module(tmp_path, capsys):
    assert make(tmp_path, '--prompt', 'a cat', '--profile') == 0
    report = (tmp_path / 'profile.md').read_text()
    assert report in capsys.readouterr().out
    rows = {}
    for line in report.splitlines():
        if line.startswith('| ') and not line.startswith('| module'):
            name, *cells = (cell.strip() for cell in line.strip('|').split('|'))
            rows[name] = cells
    # One denoised unit after the first frame: calls, first call, later calls, tokens, parameters.
    stages = {name: (cells[0], cells[3]) for name, cells in rows.items() if name.startswith('denoiser')}
    assert stages == {
        # 128 text tokens; history and unit of 2x4, 4x8 and 8x16 latents in patches of 2x2, all at most one stage apart.
        'denoiser, stage 0': ('1', str(128 + 2 + 2)),
        'denoiser, stage 1': ('1', str(128 + 8 + 8)),
        'denoiser, stage 2': ('1', str(128 + 32 + 32)),
    }
    assert rows['first frame: UNet, per step'][0] == '4' and float(rows['first frame: UNet, per step'][2]) > 0
    assert rows['video decoder, per latent frame'][0] == '2'
    assert len(rows) == 9 and all(cells[4].endswith(' MB') for cells in rows.values())
    peak = report.strip().splitlines()[-1]
    assert peak.startswith('Peak memory: host ') and float(peak.split()[3]) > 0.05


# --- several processes -------------------------------------------------------------------------------------------


def test_more_videos_than_memory_for_their_names(tmp_path):
    with pytest.raises(InputError, match=r'--num-samples 1000000000: with 2 prompts, .* in several runs'):
        make_jobs(['a', 'b'], 10**9, tmp_path)


def test_jobs_are_shared_whatever_the_others_have_made(tmp_path):
    prompts = ['a', 'b', 'c', 'd']
    every = make_jobs(prompts, 2, tmp_path).todo
    assert len(every) == 8
    parts = [make_jobs(prompts, 2, tmp_path, index, 3).todo for index in range(3)]
    assert sorted(len(part) for part in parts) == [2, 3, 3]
    assert {job.path for part in parts for job in part} == {job.path for job in every}
    # A process that starts late, or again, still takes only its own jobs.
    for job in (parts[0][0], parts[1][0]):
        write_video(job.path)
    assert make_jobs(prompts, 2, tmp_path, 1, 3) == (parts[1][1:], parts[1][:1], [])
    assert make_jobs(prompts, 2, tmp_path, 2, 3) == (parts[2], [], [])


@pytest.mark.parametrize(
    'variables', [{}, {'JAX_NUM_PROCESSES': '2'}, {'JAX_NUM_PROCESSES': 'two', 'JAX_PROCESS_ID': '0'}]
)
def test_processes_that_cannot_find_each_other(monkeypatch, tmp_path, capsys, variables):
    monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'localhost:1')
    for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert make(tmp_path, '--prompt', 'x', '--distributed') == 2
    assert 'JAX_PROCESS_ID' in capsys.readouterr().err


def test_a_stage_has_one_layout_on_the_devices():
    """With another layout, a stage would compile once for the first unit and again for the others."""
    spread = Spread(jax.devices()[:2])
    keys = spread.shard(pipeline.sample_keys(0, ['a', 'b'], [0, 1]))
    prompt = spread.shard(Prompt(jnp.zeros((2, 4, 8)), jnp.ones((2, 4), jnp.int32), jnp.zeros((2, 8))))
    layouts: dict[int, set[Any]] = {}

    def spy(stage: int, history: Any, x: Any, *_: Any) -> Any:
        layouts.setdefault(stage, set()).add(tuple(clip.sharding for clip in (*history, x)))
        return x

    sample(spy, make_plan('hybrid', 17, 64, 128), prompt, DrawnNoise(keys))
    assert {stage: len(found) for stage, found in layouts.items()} == {0: 1, 1: 1, 2: 1}
