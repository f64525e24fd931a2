"""Tests of the defaults in generation.json, and of the lookup, text length and stored types of a shipped checkpoint."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import shipped
from neodragon_jax.checkpoint.params import cast
from neodragon_jax.checkpoint.weights import WEIGHT_FILES
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.defaults import RELEASED
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.generation.tokens import Tokenizers
from neodragon_jax.pyramid.schedule import Schedule
from support.goldens import TINY_CHECKPOINT

SHAPES = {
    'frames': 17,
    'height': 64,
    'width': 64,
    'prompt_modifier': '',
    'negative_prompt': '',
    'modes': {'hybrid': {'first_frame': 'denoiser'}, 'monolithic': {'steps': [4, 5, 6], 'guidance': 2.0}},
    'prompts': 'captions of moving shapes',
    'example': 'a small red circle moves right on a blue background',
}


def written(root: pathlib.Path, values: object) -> pathlib.Path:
    """Write generation.json into a folder, and return the folder."""
    (root / generation.FILE).write_text(values if isinstance(values, str) else json.dumps(values))
    return root


def test_the_stages_are_those_of_the_schedule():
    assert Schedule().stages == generation.STAGES


def test_without_a_file_the_released_values_hold(tmp_path):
    assert generation.read(tmp_path) == RELEASED
    assert generation.read(written(tmp_path, {})) == RELEASED


def test_every_key_is_read(tmp_path):
    got = generation.read(written(tmp_path, SHAPES))
    for key in set(SHAPES) - {'modes'}:
        assert getattr(got, key) == SHAPES[key]
    assert got.mode == 'hybrid'
    assert (got.hybrid.first_frame, got.hybrid.steps) == ('denoiser', (1, 1, 1))
    # As on the command line, steps and guidance hold for all units unless unit 0 has separate values.
    assert (got.monolithic.steps, got.monolithic.first_steps) == ((4, 5, 6), (4, 5, 6))
    assert (got.monolithic.guidance, got.monolithic.first_guidance) == (2.0, 2.0)
    modes = {'monolithic': {'steps': [4, 5, 6], 'first_steps': [7, 8, 9], 'guidance': None, 'first_guidance': 3}}
    own = generation.read(written(tmp_path, {'mode': 'monolithic', 'modes': modes}))
    assert own.mode == 'monolithic' and own.monolithic.first_steps == (7, 8, 9)
    assert (own.monolithic.guidance, own.monolithic.first_guidance) == (None, 3)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ('{"frames": 17', 'not valid JSON'),
        ('[17]', 'not a JSON object'),
        ({'frame': 17}, 'unknown key "frame". Did you mean "frames"?'),
        ({'modes': {'hybird': {}}}, 'unknown key "modes.hybird". Did you mean "hybrid"?'),
        ({'modes': {'hybrid': {'step': [1, 1, 1]}}}, 'unknown key "modes.hybrid.step". Did you mean "steps"?'),
        ({'modes': {'hybrid': 1}}, '"modes.hybrid" is 1'),
        ({'modes': []}, '"modes" is []'),
        ({'mode': 'Hybrid'}, '"mode" is "Hybrid"; use one of hybrid, monolithic'),
        ({'frames': 18}, '"frames" is 18; use 8 n + 1'),
        ({'frames': '17'}, '"frames" is "17"'),
        ({'frames': True}, '"frames" is true'),
        ({'height': 65}, '"height" is 65; use a positive multiple of 64'),
        ({'width': 64.0}, '"width" is 64.0'),
        ({'prompt_modifier': None}, '"prompt_modifier" is null'),
        ({'example': 'two\nlines'}, '"example" is "two\\nlines"'),
        ({'modes': {'monolithic': {'steps': [1, 1]}}}, '"modes.monolithic.steps" is [1, 1]'),
        ({'modes': {'monolithic': {'guidance': 'high'}}}, '"modes.monolithic.guidance" is "high"'),
        (
            '{"modes": {"monolithic": {"guidance": NaN}}}',
            'modes.monolithic.guidance is nan; it must be a finite number',
        ),
        ({'modes': {'hybrid': {'first_frame': 'picture'}}}, '"modes.hybrid.first_frame" is "picture"'),
        ({'modes': {'monolithic': {'first_frame': 'model'}}}, '"modes.monolithic.first_frame" is "model"'),
    ],
)
def test_mistakes_are_named(tmp_path, values, message):
    with pytest.raises(InputError) as error:
        generation.read(written(tmp_path, values))
    assert str(error.value).startswith(f'{tmp_path / generation.FILE}: ')
    assert message in str(error.value) and '\n' not in str(error.value)


def test_a_plan_takes_the_defaults_of_the_checkpoint_unless_told(tmp_path):
    mode = generation.read(written(tmp_path, SHAPES)).of('monolithic')
    make = lambda *given: make_plan('monolithic', 17, 64, 64, *given, defaults=mode)
    assert (make().steps, make().first_steps, make().first_guidance) == ((4, 5, 6), (4, 5, 6), 2.0)
    told = make((1, 2, 3), None, None, 9.0)
    assert (told.steps, told.first_steps, told.guidance, told.first_guidance) == ((1, 2, 3), (1, 2, 3), 2.0, 9.0)


# --- lookup ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> pathlib.Path:
    """Make a folder of two shipped checkpoints, and an empty current directory."""
    for name in ('shelf/moving_shapes', 'shelf/other', 'here'):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(shipped, 'FOLDER', tmp_path / 'shelf')
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path / 'shelf'


def test_a_checkpoint_by_name(shelf):
    assert shipped.names() == ['moving_shapes', 'other']
    assert shipped.find(None) == shipped.find('moving_shapes') == shelf / 'moving_shapes'
    pathlib.Path('other').mkdir()
    assert shipped.find('other') == pathlib.Path('other'), 'a folder comes before a name'


@pytest.mark.parametrize('given', ['moving_shape', 'nowhere/moving_shapes', '', '..x'])
def test_unknown_names_list_the_shipped_ones(shelf, given):
    with pytest.raises(InputError, match=r'no such checkpoint.*moving_shapes, other'):
        shipped.find(given)


def test_nothing_is_shipped(shelf):
    shutil.rmtree(shelf)
    with pytest.raises(InputError, match='moving_shapes is not installed'):
        shipped.find(None)
    with pytest.raises(InputError, match='none is shipped'):
        shipped.find('moving_shapes')


# --- text length -------------------------------------------------------------------------------------------------


@pytest.fixture
def short(tmp_path) -> pathlib.Path:
    """The miniature with the components of a shipped checkpoint only, and texts of 16 tokens."""
    ignore = shutil.ignore_patterns('ssd_1b_*', '*_multistep_t2v')
    root = written(pathlib.Path(shutil.copytree(TINY_CHECKPOINT, tmp_path / 'short', ignore=ignore)), SHAPES)
    path = root / 'tokenizer_3' / 'tokenizer_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'model_max_length': 16}))
    return root


def test_text_length_is_the_tokenizers_if_that_is_less(short):
    texts = ['a red ball', 'word ' * 300]
    tokens, long = Tokenizers.load(short)(texts), Tokenizers.load(TINY_CHECKPOINT)(texts)
    assert tokens.t5_ids.shape == tokens.t5_mask.shape == (2, 16) and long.t5_ids.shape == (2, 128)
    np.testing.assert_array_equal(tokens.t5_ids[0], long.t5_ids[0, :16])
    assert tokens.t5_mask[1].all() and tokens.t5_ids[1, -1] == long.t5_ids[1, -1], 'cut before the end token'
    assert tokens.clip_l_ids.shape == (2, 77)


def test_padding_does_not_change_what_is_said(short):
    """At text tokens, the states of 16 and 128 tokens agree; the denoiser ignores padding, so the flow is equal."""
    few, many = pipeline.load(short), pipeline.load(TINY_CHECKPOINT)
    prompts = [few.encode_prompt(['a red ball']), many.encode_prompt(['a red ball'])]
    assert [prompt.text.shape[1] for prompt in prompts] == [16, 128]
    valid = int(prompts[0].mask.sum())
    np.testing.assert_allclose(prompts[0].text[:, :valid], prompts[1].text[:, :valid], atol=2e-5)
    x = jax.random.normal(jax.random.key(0), (1, 1, 8, 8, few.channels))
    unit, time = jnp.zeros(1, jnp.int32), jnp.full(1, 500.0)
    flows = [part.denoise(2, [x], x, unit, prompt, time) for part, prompt in zip((few, many), prompts, strict=True)]
    np.testing.assert_allclose(*flows, atol=1e-4)


# --- types of the weights ----------------------------------------------------------------------------------------


def narrow(folder: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Store a whole component in bfloat16."""
    module, params = checkpoint.load(folder)
    checkpoint.save(out, module, cast(params, jnp.bfloat16, keep=lambda path, leaf: False))
    return out


def test_bfloat16_is_stored_and_read_byte_for_byte(tmp_path):
    first = narrow(TINY_CHECKPOINT / 'causal_video_vae', tmp_path / 'first')
    checkpoint.save(tmp_path / 'again', *checkpoint.load(first))
    one, two = (folder / WEIGHT_FILES[0] for folder in (first, tmp_path / 'again'))
    assert one.read_bytes() == two.read_bytes()
    wide = load_file(TINY_CHECKPOINT / 'causal_video_vae' / WEIGHT_FILES[0])
    for name, tensor in load_file(one).items():
        np.testing.assert_array_equal(tensor, wide[name].astype(ml_dtypes.bfloat16))
