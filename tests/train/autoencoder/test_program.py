"""The training of a video autoencoder from random parameters: clips, evaluation, and the program."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import autoencoder as presets
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.config.pyramid_flow import PYRAMID_FLOW_VAE, PyramidFlowVAEConfig
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.vae import VideoVAE
from support.glossary import unexplained
from support.goldens import TINY_CHECKPOINT
from support.training_runs import copy_killed, digests
from support.vae_runs import SIZES, random
from train import moving_shapes
from train.autoencoder import program as autoencoder
from train.runtime.metrics import read_metrics
from train.runtime.settings import freeze
from train.runtime.sharding import AXES
from train.shapes.world import CPU
from train.vae import clips
from train.vae import latent_statistics as statistics
from train.vae.clips import ClipsConfig
from train.vae.perceptual import LPIPS
from train.vae.reconstruction import BEST_PSNR_DB, Terms, TermsConfig, quality

# Three levels instead of four, with one block each.


@functools.cache
def small() -> tuple[VideoVAE, Any]:
    module, params = checkpoint.load(TINY_CHECKPOINT / 'causal_video_vae')
    assert isinstance(module, VideoVAE)
    return module, jax.tree.map(jnp.asarray, params)


# --- Clips and evaluation --------------------------------------------------------------------------------------------


def test_random_cuts_are_parts_of_the_clips():
    """Every pixel encodes its position: cuts are contiguous, and their places vary with the clip and the key."""
    cut = ClipsConfig(9, 16, 24)
    places = np.stack(np.meshgrid(np.arange(17), np.arange(20), np.arange(32), indexing='ij'), axis=-1)
    videos = jnp.asarray(np.stack([places] * 8).astype(np.uint8))
    starts = []
    for seed in (0, 1):
        got = np.rint((np.asarray(clips.random_cuts(videos, cut, jax.random.key(seed))) + 1) * 127.5).astype(int)
        assert got.shape == (8, 9, 16, 24, 3)
        starts += list(got[:, 0, 0, 0])
        assert np.array_equal(got - got[:, :1, :1, :1], np.stack([places[:9, :16, :24]] * 8))
    assert len({tuple(start) for start in starts}) > 8
    whole = clips.random_cuts(videos, ClipsConfig(17, 20, 32), jax.random.key(0))
    assert np.array_equal(whole, clips.to_float(videos))


def test_stored_clips(tmp_path):
    source = moving_shapes.MovingShapesSource(CPU, 9, (32, 32), count=6)
    moving_shapes.write_samples(source, tmp_path / 'clips')
    opened = clips.open_clips(str(tmp_path / 'clips'), ClipsConfig(9, 16, 24, held_out=2))
    assert len(opened.training) == 4
    assert set(opened.training[0]) == {'video'}
    assert np.array_equal(opened.training[3]['video'], source[3]['video'])
    assert np.array_equal(opened.held_out[1], source[5]['video'][:, 8:24, 4:28])
    with pytest.raises(InputError, match=r'9 frames of 32x32, a cut is 17 frames of 16x24'):
        clips.open_clips(str(tmp_path / 'clips'), ClipsConfig(17, 16, 24, held_out=2))
    with pytest.raises(InputError, match='no such folder'):
        clips.open_clips(str(tmp_path / 'none'), ClipsConfig())
    with pytest.raises(InputError, match=r'shapes:cpu, shapes:gpu.*"gpu"'):
        clips.open_clips('shapes:gpuu', ClipsConfig())


def test_drawn_clips_tell_which_attributes_survive():
    opened = clips.open_clips('shapes:cpu', ClipsConfig(17, 64, 64, held_out=2))
    assert opened.read is not None
    whole = opened.read(1, opened.held_out[1])
    assert {name for name, value in whole.items() if value == 1} >= {'shape_right', 'color_right', 'direction_right'}
    assert 0 < whole['mismatch'] < 0.06
    backwards = opened.read(1, opened.held_out[1][::-1])
    assert backwards['direction_right'] == 0 and backwards['shape_right'] == 1
    small = clips.open_clips('shapes:cpu', ClipsConfig(9, 16, 16, held_out=1))
    assert small.read is not None and small.read(0, small.held_out[0]) == {}


def test_quality():
    want = np.random.default_rng(0).integers(0, 245, (3, 16, 16, 3), dtype=np.uint8)
    assert quality(want, want) == (BEST_PSNR_DB, pytest.approx(1.0))
    got = quality(want + np.uint8(10), want)
    assert got.psnr == pytest.approx(20 * np.log10(255 / 10), abs=1e-3)
    noisy = np.where(np.indices(want.shape).sum(axis=0) % 2, want, 0).astype(np.uint8)
    assert quality(noisy, want).ssim < got.ssim < 1


def test_terms_are_weighted_and_lpips_is_missed_aloud(monkeypatch):
    got, want = random(2, 3, 32, 32, 3), random(2, 3, 32, 32, 3, seed=1)
    terms = Terms(TermsConfig(absolute=2.0, square=0.5, lpips=1.0))
    assert 'WITHOUT LPIPS' in terms.describe() and '2 absolute + 0.5 square' in terms.describe()
    loss, values = terms(terms.frozen(), got, want)
    assert loss == pytest.approx(float(2 * jnp.abs(got - want).mean() + 0.5 * jnp.square(got - want).mean()), rel=1e-5)
    assert values['psnr'] == pytest.approx(float(-10 * jnp.log10(jnp.square(got - want).mean() / 4)), rel=1e-5)

    module = LPIPS('alex')
    params = jax.jit(module.init)(jax.random.key(0), got[:, 0], want[:, 0])['params']
    monkeypatch.setattr('train.vae.reconstruction.load_lpips', lambda path, dtype: (module, params))
    terms = Terms(TermsConfig(absolute=1.0, lpips=0.25, lpips_weights='weights.npz'))
    assert '0.25 lpips; LPIPS by alex from weights.npz' in terms.describe()
    loss, values = jax.jit(terms)(terms.frozen(), got, want)
    distances = [jax.jit(module.apply)({'params': params}, got[:, frame], want[:, frame]) for frame in range(3)]
    assert values['lpips'] == pytest.approx(np.mean(distances), rel=1e-5)
    assert loss == pytest.approx(float(values['absolute'] + 0.25 * values['lpips']), rel=1e-5)


# --- Training ---------------------------------------------------------------------------------------------------------

STEPS = 40


def settings(workdir, steps: int = STEPS):
    config = presets.get_config('tiny')
    config.update({'workdir': str(workdir), 'clips': {'frames': 9, 'height': 16, 'width': 16, 'held_out': 2}})
    config.autoencoder.update({'sizes': SIZES, 'statistics': 4, 'evaluation': {'batch': 2, 'videos': 1}})
    config.autoencoder.optimizer.update({'learning_rate': 1e-2, 'warmup_steps': 5})
    config.loop.update({'steps': steps, 'log_every': 1, 'checkpoint_every': STEPS // 2, 'evaluate_every': STEPS // 2})
    config.loop.mesh = dict.fromkeys(AXES, 1)
    return config


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('unbroken')
    autoencoder.RECIPE.run(settings(workdir))
    return workdir


def test_it_learns(unbroken):
    rows = read_metrics(unbroken)
    first, last = (np.mean([row['loss'] for row in part]) for part in (rows[:3], rows[-3:]))
    evaluated = [row['eval/psnr'] for row in rows if 'eval/psnr' in row]
    print(f'loss {first:.3f} -> {last:.3f}, held-out PSNR {evaluated}')
    assert last < 0.6 * first
    # The initialization alone gives much of the quality.
    assert len(evaluated) == 2 and evaluated[1] > evaluated[0]
    assert not unexplained({name for row in rows for name in row})


def test_result_is_in_the_released_layout_with_latents_as_expected(unbroken):
    module, params = checkpoint.load(unbroken / 'result' / folders.PYRAMID_FLOW_VAE)
    assert isinstance(module, NativeVAE) and module.config == PyramidFlowVAEConfig(**SIZES)
    record = json.loads((unbroken / 'result' / 'autoencoder.json').read_text())
    assert record['iterations'] == STEPS and not record['terms']['with_lpips']
    cut = ClipsConfig(9, 16, 16, held_out=2)
    opened = clips.open_clips('shapes:cpu', cut)
    run = jax.jit(lambda x: module.apply({'params': params}, x, method='encode'))
    moments = [np.asarray(run(clips.to_float(jnp.asarray(opened.training[i]['video'][None])))) for i in range(4)]
    measured = statistics.measure(moments)._asdict()
    print(measured)
    assert measured == {name: pytest.approx(value, abs=1e-3) for name, value in record['latents']['after'].items()}
    miss = lambda moments: sum(np.log(moments[f'{kind}_deviation']) ** 2 for kind in ('first', 'later'))
    assert miss(measured) < miss(record['latents']['before'])


def test_evaluation_shows_clips(unbroken):
    folder = unbroken / 'samples' / f'step_{STEPS:06d}'
    assert sorted(path.name for path in folder.iterdir()) == ['000.mp4', '000.png', 'clips.json']
    assert len(json.loads((folder / 'clips.json').read_text())) == 2


@pytest.mark.long
def test_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(unbroken, tmp_path):
    autoencoder.RECIPE.run(settings(copy_killed(unbroken, STEPS // 2, tmp_path)))
    assert len(digests(unbroken / 'result')) == 3
    assert digests(tmp_path / 'result') == digests(unbroken / 'result')


@pytest.mark.slow  # the loop's own tests do this with a small program; here it is half a minute of compiling
@pytest.mark.parametrize(('mesh', 'parts'), [((8, 1, 1), 1), ((2, 2, 1), 2)])
def test_meshes_and_parts_of_batches_agree(unbroken, tmp_path, mesh, parts):
    """The uninterrupted run is on one device, each batch at once."""
    config = settings(tmp_path, 3)
    config.loop.mesh = dict(zip(AXES, mesh, strict=True))
    config.loop.evaluate_every = 0
    config.autoencoder.accumulate = parts
    autoencoder.RECIPE.run(config)
    for got, want in zip(read_metrics(tmp_path), read_metrics(unbroken), strict=False):
        for name in ('loss', 'grad_norm', 'kl'):
            assert got[name] == pytest.approx(want[name], rel=2e-4), (got['step'], name)


def test_it_goes_on_from_a_stored_autoencoder(unbroken):
    folder = str(unbroken / 'result' / folders.PYRAMID_FLOW_VAE)
    cut = ClipsConfig(9, 16, 16)
    program = autoencoder.Autoencoder(autoencoder.AutoencoderConfig(start=folder), clips.blank_clips(cut), cut)
    assert program.module.config == PyramidFlowVAEConfig(**SIZES)
    state = jax.jit(program.init_state)(jax.random.key(0), program.frozen())
    stored = checkpoint.load(folder)[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params, stored))
    assert jax.tree.all(jax.tree.map(np.array_equal, state.result, stored))
    other = autoencoder.AutoencoderConfig(start=str(TINY_CHECKPOINT / 'causal_video_vae'))
    with pytest.raises(InputError, match='holds an AsymmetricCausalVideoVAE; pass the folder of a CausalVideoVAE'):
        autoencoder.Autoencoder(other, clips.blank_clips(cut), cut)


def test_full_size_has_a_plan_without_data(capsys):
    config = presets.get_config('')
    config.loop.mesh = {'data': 1, 'fsdp': 8, 'tensor': 1}
    autoencoder.RECIPE.run(config, dry_run=True)
    out = capsys.readouterr().out
    assert 'batch  video  [32, 17, 256, 256, 3]  uint8' in out
    assert freeze(PyramidFlowVAEConfig, config.autoencoder.sizes.to_dict()) == PYRAMID_FLOW_VAE
    large = next(line for line in out.splitlines() if line.startswith('state/params/decoder/up_0/double_space/kernel'))
    assert 'fsdp' in large


def test_settings_are_refused_with_a_remedy(tmp_path):
    config = settings(tmp_path)
    for path, value, message in (
        ('data', '', 'config.data is empty'),
        ('workdir', '', 'config.workdir is empty'),
        ('autoencoder.kl', -1.0, 'kl is -1'),
        ('autoencoder.terms.absolute', 0.0, 'both 0'),
        ('autoencoder.terms.lpips_weights', 'x.npz', 'lpips is 0'),
        ('clips.frames', 16, 'frames is 16'),
        ('clips.height', 20, 'multiples of 8'),
    ):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({path: value})
        with pytest.raises(InputError, match=message):
            autoencoder.RECIPE.run(changed)
    with pytest.raises(InputError, match='tinny'):
        presets.get_config('tinny')
