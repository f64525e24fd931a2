"""Tests of the safety checker: its names, its rule, and black frames for refused videos."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import read_mp4
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.abstract import example_inputs, tensor_shapes
from neodragon_jax.config.safety_checker import FULL_SAFETY_CHECKER, SafetyCheckerConfig
from neodragon_jax.generation import safety
from neodragon_jax.generation.param_store import Store
from neodragon_jax.models.safety_checker import Preparation, StableDiffusionSafetyChecker, refused
from support.goldens import TINY_CHECKPOINT, relative_error
from support.sessions import clips, make, open_session, plain_clip, plain_session

TINY_CHECKER = SafetyCheckerConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    projection_dim=12,
)


def write_checker(root: pathlib.Path, threshold: float) -> tuple[StableDiffusionSafetyChecker, dict[str, Any]]:
    """Write a random checker and its preprocessor; a threshold of -2 refuses everything, of 1 nothing."""
    module = StableDiffusionSafetyChecker(TINY_CHECKER)
    params = jax.jit(module.init)(jax.random.key(0), *example_inputs(module))['params']
    params = jax.tree.map(np.asarray, params)
    params['concept_thresholds'] = np.full(17, threshold, np.float32)
    checkpoint.save(root / folders.SAFETY_CHECKER, module, params)
    (root / folders.FEATURE_EXTRACTOR).mkdir()
    values = {'size': 28, 'crop_size': {'height': 28, 'width': 28}, 'image_mean': [0.5] * 3, 'image_std': [0.25] * 3}
    (root / folders.FEATURE_EXTRACTOR / 'preprocessor_config.json').write_text(json.dumps(values))
    return module, params


def test_checker_names_of_the_release_and_round_trip(tmp_path):
    module, params = write_checker(tmp_path, 0.3)
    folder = tmp_path / folders.SAFETY_CHECKER
    tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
    tower = 'vision_model.vision_model'
    assert {name: tensors[name].shape for name in tensors if 'layers' not in name} == {
        f'{tower}.embeddings.class_embedding': (16,),
        f'{tower}.embeddings.patch_embedding.weight': (16, 3, 14, 14),
        f'{tower}.embeddings.position_embedding.weight': (5, 16),
        **{
            f'{tower}.{norm}.{part}': (16,)
            for norm in ('pre_layrnorm', 'post_layernorm')
            for part in ('weight', 'bias')
        },
        'visual_projection.weight': (12, 16),
        'concept_embeds': (17, 12),
        'concept_embeds_weights': (17,),
        'special_care_embeds': (3, 12),
        'special_care_embeds_weights': (3,),
    }
    # Old files also hold a constant.
    tensors[f'{tower}.embeddings.position_ids'] = np.arange(5)[None]
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
    again, loaded = checkpoint.load(folder)
    assert again == module
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))


def numpy_tower(tensors: dict[str, np.ndarray], picture: np.ndarray) -> np.ndarray:
    """Return CLIP's embedding of one picture [S, S, 3] from released tensors, in float64."""
    get = lambda name: np.asarray(tensors[f'vision_model.vision_model.{name}'], np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * get(f'{name}.weight') + get(f'{name}.bias')

    linear = lambda x, name: x @ get(f'{name}.weight').T + get(f'{name}.bias')
    kernel, size = get('embeddings.patch_embedding.weight'), TINY_CHECKER.patch_size
    starts = range(0, TINY_CHECKER.image_size, size)
    patches = [picture[y : y + size, x : x + size] for y in starts for x in starts]
    tokens = [get('embeddings.class_embedding'), *(np.einsum('dcyx,yxc->d', kernel, patch) for patch in patches)]
    x = norm(np.stack(tokens) + get('embeddings.position_embedding.weight'), 'pre_layrnorm')
    for i in range(TINY_CHECKER.num_hidden_layers):
        layer, y = f'encoder.layers.{i}', norm(x, f'encoder.layers.{i}.layer_norm1')
        query, key, value = (
            linear(y, f'{layer}.self_attn.{part}_proj').reshape(len(y), TINY_CHECKER.num_attention_heads, -1)
            for part in 'qkv'
        )
        scores = np.exp(np.einsum('qnk,snk->nqs', query, key) / np.sqrt(query.shape[-1]))
        mixed = np.einsum('nqs,snk->qnk', scores / scores.sum(-1, keepdims=True), value).reshape(y.shape)
        x = x + linear(mixed, f'{layer}.self_attn.out_proj')
        hidden = linear(norm(x, f'{layer}.layer_norm2'), f'{layer}.mlp.fc1')
        x = x + linear(hidden / (1 + np.exp(-1.702 * hidden)), f'{layer}.mlp.fc2')
    return norm(x[0], 'post_layernorm') @ np.asarray(tensors['visual_projection.weight'], np.float64).T


def test_vision_tower(tmp_path):
    module, params = write_checker(tmp_path, 0.3)
    random = np.random.default_rng(0)
    # Initial biases are zero and norms one, which would hide a wrong name.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32), params)
    checkpoint.save(tmp_path / folders.SAFETY_CHECKER, module, params)
    pictures = random.normal(size=(2, 28, 28, 3)).astype(np.float32)
    tensors = safetensors.numpy.load_file(tmp_path / folders.SAFETY_CHECKER / 'model.safetensors')
    want = [numpy_tower(tensors, picture) for picture in pictures]
    got = jax.jit(lambda params, x: module.apply({'params': params}, x, method='embed'))(params, jnp.asarray(pictures))
    assert relative_error(got, want) < 2e-5


def test_full_size_checker_has_the_published_number_of_parameters():
    """CLIP ViT-L/14 with projection has 303,966,208; the checker adds 20 concepts of 768 and their thresholds."""
    shapes = tensor_shapes('StableDiffusionSafetyChecker', FULL_SAFETY_CHECKER)
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == 303_966_208 + 20 * 769


def numpy_rule(picture, concepts, thresholds, special, special_thresholds) -> bool:
    """Classify one embedding concept by concept, as a slow reference."""
    cosine = lambda a, b: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    adjustment = 0.0
    for embed, threshold in zip(special, special_thresholds, strict=True):
        if round(cosine(picture, embed) - threshold + adjustment, 3) > 0:
            adjustment = 0.01
    scores = [cosine(picture, e) - t + adjustment for e, t in zip(concepts, thresholds, strict=True)]
    return any(round(score, 3) > 0 for score in scores)


def test_cosine_rule():
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape)
    pictures, concepts, special = draw(400, 8), draw(17, 8), draw(3, 8)
    thresholds, special_thresholds = random.uniform(0.55, 0.95, 17), random.uniform(0.1, 0.5, 3)
    arguments = [concepts, thresholds, special, special_thresholds]
    want = [numpy_rule(picture, *arguments) for picture in pictures]
    got = refused(*(jnp.asarray(x, jnp.float32) for x in (pictures, *arguments)))
    np.testing.assert_array_equal(got, want)
    assert 20 < sum(want) < 380

    # A picture just below a threshold is refused only if it resembles a special concept.
    axes = np.eye(3, dtype=np.float32)
    picture = np.array([[0.6, 0.8, 0.0]], np.float32)
    for special_threshold, want in ((0.7, True), (0.9, False)):
        arguments = (picture, axes[:1], np.float32([0.605]), axes[1:2], np.float32([special_threshold]))
        assert bool(refused(*map(jnp.asarray, arguments))[0]) is want


def test_preparation_resizes_crops_and_scales(tmp_path):
    write_checker(tmp_path, 0.3)
    prepare = Preparation.load(tmp_path / folders.FEATURE_EXTRACTOR)
    wide = np.zeros((1, 28, 84, 3), np.uint8)
    wide[:, :, 28:56] = 255
    np.testing.assert_allclose(prepare(wide), (1 - 0.5) / 0.25)
    assert prepare(np.zeros((2, 64, 128, 3), np.uint8)).shape == (2, 28, 28, 3)
    (tmp_path / folders.FEATURE_EXTRACTOR / 'preprocessor_config.json').write_text('{}')
    with pytest.raises(InputError, match=r'preprocessor_config\.json: size is None; it must be'):
        Preparation.load(tmp_path / folders.FEATURE_EXTRACTOR)


def weight(name, change):
    """Return a change of one tensor of a checker."""

    def apply(root):
        path = root / folders.SAFETY_CHECKER / 'model.safetensors'
        tensors = {key: value.copy() for key, value in safetensors.numpy.load_file(path).items()}
        tensors[name] = change(tensors[name])
        safetensors.numpy.save_file(tensors, path)

    return apply


def first(value):
    def apply(tensor):
        tensor.reshape(-1)[0] = value
        return tensor

    return apply


def preparation(**values):
    """Return a change of the preprocessor's values."""

    def apply(root):
        path = root / folders.FEATURE_EXTRACTOR / 'preprocessor_config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def replace_by_file(root):
    shutil.rmtree(root / folders.SAFETY_CHECKER)
    (root / folders.SAFETY_CHECKER).write_text('')


TOWER = 'vision_model.vision_model.embeddings'
NAN = float('nan')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (weight('visual_projection.weight', first(NAN)), 'visual_projection.weight has values that are not finite'),
        (weight(f'{TOWER}.patch_embedding.weight', first(NAN)), 'has values that are not finite'),
        (weight('concept_embeds_weights', lambda tensor: tensor * NAN), 'has values that are not finite'),
        (weight(f'{TOWER}.class_embedding', first(np.inf)), 'has values that are not finite'),
        (weight('concept_embeds', lambda tensor: tensor * 0), 'a concept of concepts is all zeros'),
        (weight('special_care_embeds', lambda tensor: tensor * 0), 'a concept of special_concepts is all zeros'),
        (weight('concept_embeds_weights', lambda tensor: tensor * 0 + 1.5), 'concept_thresholds is above 1'),
        (weight('special_care_embeds_weights', lambda tensor: tensor * 0 + 1e6), 'special_thresholds is above 1'),
        (weight('concept_embeds', lambda tensor: tensor[:0]), r'has shape \[0, 12\]; config.json asks for \[17, 12\]'),
        (preparation(image_std=[0, 0, 0]), r'image_std\[0\] is 0; it must be greater than 0'),
        (preparation(image_mean=[NAN] * 3), r'image_mean\[\d\] is nan; it must be a finite number'),
        (preparation(image_mean=[0.5]), 'image_mean'),
        (preparation(image_mean=[0.5, 0.5]), 'image_mean'),
        (preparation(size=0), 'size is 0; it must be'),
        (preparation(size=-28), 'size is -28; it must be'),
        (preparation(size={'height': 28, 'width': 56}), 'size is .*; give one number'),
        (preparation(size=14), 'crop_size 28 exceeds size 14'),
        (preparation(crop_size=28.9), 'crop_size is 28.9; it must be'),
        (replace_by_file, 'no such folder|is not a folder'),
    ],
)
def test_damaged_checker_is_refused_before_it_judges(tmp_path, change, message):
    write_checker(tmp_path, threshold=-2.0)
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        safety.load(tmp_path, Store())


@pytest.mark.parametrize('value', [NAN, np.inf])
def test_scores_that_are_no_numbers_refuse_the_picture(value):
    picture, concepts, high = np.ones((1, 4), np.float32), np.ones((2, 4), np.float32), np.full(2, 2.0, np.float32)
    known = (concepts, high, concepts, high)
    assert not refused(*map(jnp.asarray, (picture, *known)))[0]
    picture[0, 0] = value
    assert refused(*map(jnp.asarray, (picture, *known)))[0]


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """A checkpoint of links to the miniature, so that components can be added."""
    folder = tmp_path / 'checkpoint'
    folder.mkdir()
    for child in TINY_CHECKPOINT.iterdir():
        (folder / child.name).symlink_to(child)
    return folder


@pytest.mark.long
def test_refused_videos_are_black_and_named(tmp_path, root, capsys):
    write_checker(root, threshold=-2.0)
    assert make(tmp_path / 'out', '--prompt', 'a cat', root=root) == 0
    assert 'a cat-0.mp4 (refused by the safety checker, made black)' in capsys.readouterr().out
    assert read_mp4(tmp_path / 'out' / 'a cat-0.mp4').max() < 4


@pytest.mark.long
def test_checker_that_refuses_nothing_changes_nothing(root):
    write_checker(root, threshold=1.0)
    checker = safety.load(root, Store())
    assert checker is not None
    plain = plain_session()
    checked = dataclasses.replace(plain, loaded=dataclasses.replace(plain.loaded, checker=checker))
    allowed = clips(checked, ['a cat'])[0]
    assert not allowed.refused
    np.testing.assert_array_equal(allowed.frames, plain_clip())


def test_a_checker_that_is_off_or_absent(root, capsys):
    write_checker(root, threshold=1.0)
    worker = open_session('--no-safety-checker', '--mode', 'monolithic', '--low-memory', root=root)
    assert worker.loaded.checker is None and capsys.readouterr().out == ''
    shutil.rmtree(root / folders.SAFETY_CHECKER)
    with pytest.raises(InputError, match=r'safety_checker: no such folder, but feature_extractor.*--no-safety-checker'):
        safety.load(root, Store())
    shutil.rmtree(root / folders.FEATURE_EXTRACTOR)
    worker = open_session('--mode', 'monolithic', '--low-memory', root=root)
    line = capsys.readouterr().out
    assert worker.loaded.checker is None
    assert line.count('\n') == 1 and 'No safety_checker' in line and 'not checked' in line


def test_refused_first_frame_alone(root):
    """First frames and videos are checked separately: black where refused, unchanged elsewhere."""
    write_checker(root, threshold=0.3)
    checker = safety.load(root, Store())
    assert checker is not None
    frames = np.random.default_rng(0).uniform(-1, 1, (2, 1, 64, 128, 3)).astype(np.float32)
    black, which = safety.SafetyChecker(checker.prepare, lambda _: np.array([False, True])).frames(frames)
    np.testing.assert_array_equal(black[0], frames[0])
    assert (black[1] == -1).all() and which.tolist() == [False, True]
    # Only frame 8 of the second video is refused.
    verdicts = iter([np.array([False, False]), np.array([False, True])])
    video = np.full((2, 9, 64, 128, 3), 7, np.uint8)
    black, which = safety.SafetyChecker(checker.prepare, lambda _: next(verdicts)).videos(video)
    assert which.tolist() == [False, True] and (black[0] == 7).all() and not black[1].any()
