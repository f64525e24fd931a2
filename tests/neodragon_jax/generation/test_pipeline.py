"""Tests of the whole pipeline on the miniature checkpoint against the reference with the same random numbers."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import image_to_frame
from neodragon_jax.checkpoint.classes import COMPONENTS
from neodragon_jax.config.neodragon import ContextAdapterConfig, MMDiTConfig, VideoVAEConfig
from neodragon_jax.generation import first_frame, pipeline
from neodragon_jax.generation.devices import Spread
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.generation.tokens import DEFAULT_MODIFIER, DEFAULT_NEGATIVE_PROMPT
from neodragon_jax.models.vae import normalize, posterior_sample
from neodragon_jax.pyramid.sampler import DrawnNoise, Plan, Prompt, jax_denoiser, sample
from support.goldens import GOLDENS, TINY_CHECKPOINT, channels_last, load_golden, relative_error

LOOP_TOLERANCE = 5e-6


class Replay:
    """Noise from a golden, in order of use."""

    def __init__(self, arrays: dict[str, np.ndarray], run: str):
        self.arrays, self.run, self.used = arrays, run, 0

    def _take(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        x = channels_last(self.arrays[f'{self.run}/draw/{name}'])
        assert x.shape == shape
        return jnp.asarray(x)

    def initial(self, shape):
        return self._take('initial_noise_fullres', shape)

    def posterior(self, shape):
        return self._take('vae_eps', shape)

    def block(self, unit, stage, shape):
        self.used += 1
        return self._take(f'block_noise{self.used - 1:02d}', shape)


LOOP_RUNS = json.loads((GOLDENS / 'ar_loop' / 'runs.json').read_text())


@functools.cache
def loop_component(name: str, kind: str, config: Any) -> tuple[Any, Any]:
    """Load a component of the ar_loop golden, whose files lie flat in one folder."""
    import safetensors.numpy
    from flax import traverse_util

    component = COMPONENTS[kind]
    values = config.from_json(json.loads((GOLDENS / 'ar_loop' / f'{name}.config.json').read_text()), name)
    tensors = safetensors.numpy.load_file(GOLDENS / 'ar_loop' / f'{name}.safetensors')
    flat = {entry.path: entry.convert.to_flax(tensors[entry.torch_name]) for entry in component.entries(values)}
    return component.build(values), traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize('run', LOOP_RUNS)
def test_sampling_loop(run):
    golden, settings = load_golden('ar_loop'), LOOP_RUNS[run]
    model, params = loop_component('dit', 'PyramidMMDiT', MMDiTConfig)
    adapter, adapter_params = loop_component('context_adapter', 'ContextAdapter', ContextAdapterConfig)
    prompts = {}
    for side in ('pos', 'neg') if settings['cfg'] else ('pos',):
        text = jax.jit(adapter.apply)({'params': adapter_params}, jnp.asarray(golden[f'{run}/in/{side}_text']))
        mask, pooled = (jnp.asarray(golden[f'{run}/in/{side}_{name}']) for name in ('text_mask', 'pooled'))
        prompts[side] = Prompt(text, mask, pooled)
    noise, first = Replay(golden, run), None
    if settings['img']:
        vae, vae_params = loop_component('vae', 'AsymmetricCausalVideoVAE', VideoVAEConfig)
        pixels = image_to_frame(golden[f'{run}/in/image_uint8_hwc'], settings['height'], settings['width'])[None, None]
        encode = jax.jit(functools.partial(vae.apply, method='encode'))
        moments = encode({'params': vae_params}, jnp.asarray(pixels))
        first = normalize(posterior_sample(moments, noise.posterior((1, 1, 8, 16, 16))))
    plan = Plan(
        frames=(settings['nf'] - 1) // 8 + 1,
        height=8,
        width=16,
        steps=tuple(settings['vsteps']),
        first_steps=tuple(settings['steps']),
        guidance=settings['vgs'] if settings['cfg'] else None,
        first_guidance=settings['gs'] if settings['cfg'] else None,
    )
    seen = []

    def check(unit: int, stage: int, step: int, x: jax.Array) -> None:
        index = sum(plan.unit_steps(unit)[:stage]) + step
        want = golden[f'{run}/trace/unit{unit - settings["start_unit"]}_step{index}']
        seen.append(relative_error(x, channels_last(want)))

    latents = sample(jax_denoiser(model.apply, params), plan, prompts['pos'], noise, prompts.get('neg'), first, check)
    assert relative_error(latents, channels_last(golden[f'{run}/out/latents'])) < LOOP_TOLERANCE
    assert len(seen) == plan.steps_total(settings['start_unit']) and max(seen) < LOOP_TOLERANCE
    assert noise.used == settings['n_block_noises']


@functools.cache
def tiny_golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / 'tiny_checkpoint_golden.npz') as arrays:
        return dict(arrays)


@functools.cache
def components(mode: str) -> pipeline.Components:
    return pipeline.load(TINY_CHECKPOINT, mode)


class PictureReplay:
    """Noise of the first-frame model from the golden."""

    def initial(self, shape):
        return jnp.asarray(channels_last(tiny_golden()['hybrid_ssd1b/draw/ssd_x0']))

    def step(self, number, shape):
        return jnp.asarray(channels_last(tiny_golden()[f'hybrid_ssd1b/draw/ssd_noise{number}']))


@pytest.mark.parametrize('run', ['hybrid_given_frame', 'hybrid_ssd1b', 'monolithic'])
def test_prompt_to_frames(run):
    golden = tiny_golden()
    settings = json.loads((GOLDENS / 'tiny_checkpoint_golden.json').read_text())[run]
    size = settings['num_frames'], settings['height'], settings['width']
    steps = settings.get('video_num_inference_steps'), settings.get('num_inference_steps')
    plan = make_plan(settings['mode'], *size, *steps)
    frame = None
    if settings['image']:
        frame = image_to_frame(golden[f'{run}/in/image_uint8'], *size[1:])[None, None]
    parts = components(settings['mode'])
    latents = []
    prompt = [settings['prompt'] + DEFAULT_MODIFIER]
    if settings['ssd']:
        draw = first_frame.load(TINY_CHECKPOINT, 2 * size[1], 2 * size[2])
        frame = first_frame.to_frames(draw(prompt, PictureReplay()), *size[1:])
    frames = pipeline.generate(
        parts, plan, prompt, Replay(golden, run), DEFAULT_NEGATIVE_PROMPT, frame,
        on_step=lambda unit, stage, step, x: latents.append((unit, x)),
    )  # fmt: skip
    last = {unit: x for unit, x in latents}
    want = channels_last(golden[f'{run}/out/latents_normalised'])
    for unit, x in last.items():
        assert relative_error(x, want[:, unit : unit + 1]) < LOOP_TOLERANCE
    want = golden[f'{run}/out/frames_uint8']
    difference = np.abs(frames[0].astype(int) - want.astype(int))
    # Truncation to bytes turns a float error of 1e-6 at an integer into one step.
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.long
def test_a_sample_does_not_depend_on_its_batch_or_devices():
    plan = components('hybrid').check(make_plan('hybrid', 9, 64, 128))
    prompts, numbers = ['a cat', 'a dog', 'a cat'], [0, 0, 1]
    pixels = jnp.zeros((1, 1, 64, 128, 3))

    def generate(chosen: list[int], spread: Spread, parts: pipeline.Components) -> np.ndarray:
        keys = pipeline.sample_keys(7, [prompts[i] for i in chosen], [numbers[i] for i in chosen])
        noise = DrawnNoise(spread.shard(keys))
        frames = jnp.repeat(pixels, len(chosen), axis=0)
        return pipeline.generate(parts, plan, [prompts[i] for i in chosen], noise, '', frames, shard=spread.shard)

    one = Spread(jax.devices()[:1])
    three = Spread(jax.devices()[:3])
    together = generate([0, 1, 2], three, pipeline.load(TINY_CHECKPOINT, place=three.replicate))
    for index in range(3):
        alone = generate([index], one, components('hybrid'))
        assert np.abs(alone[0].astype(int) - together[index].astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - together[2].astype(int)).max() > 1, 'sample number is ignored'


@pytest.mark.parametrize(
    ('function', 'named'),
    [
        ('encode_prompt', pipeline.TEXT_ENCODERS),
        ('encode_image', pipeline.VIDEO_ENCODER),
        ('denoise', pipeline.DENOISER),
        ('decode_step', pipeline.VIDEO_DECODER),
    ],
)
def test_the_first_module_whose_output_is_not_finite_is_named(function, named):
    """No later module runs, and the denoiser takes one step."""
    parts = pipeline.load(TINY_CHECKPOINT, 'hybrid', dtype=np.float32)
    plan = parts.check(make_plan('hybrid', 17, 64, 64))
    whole, steps = getattr(parts, function), []
    broken = lambda *args: jax.tree.map(lambda x: x * np.inf if x.dtype == np.float32 else x, whole(*args))
    parts = dataclasses.replace(parts, **{function: broken})
    noise = DrawnNoise(pipeline.sample_keys(0, ['a cat'], [0]))
    frame = np.zeros((1, 1, 64, 64, 3), np.float32)
    with pytest.raises(InputError, match=f'^{named}: its output has values that are not finite numbers; copy'):
        pipeline.generate(parts, plan, ['a cat'], noise, '', frame, lambda *step: steps.append(step))
    assert len(steps) == (plan.calls(1) if function == 'decode_step' else 0)


def test_calls_are_counted():
    """18 for the few-step student, 21 with unit 0; the multi-step teacher's 20/10 steps with guidance."""
    assert make_plan('hybrid', 49, 320, 512).calls(first_unit=1) == 18
    assert make_plan('hybrid', 49, 320, 512).calls(first_unit=0) == 21
    assert make_plan('monolithic', 49, 320, 512).calls(first_unit=0) == 2 * (60 + 6 * 30)


def test_one_compilation_per_stage():
    plan = components('hybrid').check(make_plan('hybrid', 25, 64, 128))
    shapes = set()
    denoise = components('hybrid').denoise

    def spy(stage, history, x, *rest):
        shapes.add((stage, x.shape, *(clip.shape for clip in history)))
        return denoise(stage, history, x, *rest)

    prompt = components('hybrid').encode_prompt(['x'])
    noise = DrawnNoise(pipeline.sample_keys(0, ['x'], [0]))
    sample(spy, plan, prompt, noise)
    assert len(shapes) == 3


@pytest.mark.parametrize(
    ('size', 'named'), [((48, 64, 128), '48 frames'), ((49, 72, 128), 'height 72'), ((49, 64, 0), 'width 0')]
)
def test_sizes_that_do_not_fit(size, named):
    with pytest.raises(InputError, match=named):
        make_plan('hybrid', *size)


def test_frame_larger_than_the_positional_table():
    with pytest.raises(InputError, match='24x24'):
        components('hybrid').check(make_plan('hybrid', 9, 512, 512))


def test_video_longer_than_the_rotary_table():
    few = dataclasses.replace(components('hybrid'), max_frames=2)
    few.check(make_plan('hybrid', 9, 64, 64))
    message = '17 frames are 3 latent frames; the checkpoint has positions for 2; use at most 9 frames'
    with pytest.raises(InputError, match=message):
        few.check(make_plan('hybrid', 17, 64, 64))


def test_guidance_without_negative_prompt():
    plan = components('hybrid').check(make_plan('hybrid', 9, 64, 128, guidance=5.0))
    prompt = components('hybrid').encode_prompt(['x'])
    with pytest.raises(InputError, match='negative'):
        sample(components('hybrid').denoise, plan, prompt, DrawnNoise(pipeline.sample_keys(0, ['x'], [0])))
