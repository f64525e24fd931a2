"""Every program as shapes: it builds without data, equals the real one except for values, and fits on a slice."""

from __future__ import annotations

import functools
import importlib
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict
from PIL import Image

from configs import teacher as teacher_config
from configs.dmd import RECIPES
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.checkpoint.random_params import random_params
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.models.native_decoder import NativeVAE
from support.goldens import TINY_CHECKPOINT
from train import random_teacher
from train.aot import jobs
from train.data import ArraySpec, RecordSpec, SampleWriter
from train.dmd import program as dmd
from train.runtime import loop, runner
from train.runtime.runner import recipe_of
from train.runtime.sharding import AXES, SMALL, MeshConfig, make_mesh, path_name
from train.runtime.step import variants
from train.teacher import program as teacher_program

CHIPS = 16
FULL = {
    'autoencoder': 'full',
    'decoder': 'full',
    'dmd': 'full',
    'pruning': 'stage2',
    'super_resolution': 'full',
    'teacher': 'full',
    'text': 'full',
}


def settings_of(name: str, preset: str) -> ConfigDict:
    return importlib.import_module(f'configs.{name}').get_config(preset)


def test_every_program_with_settings_is_here():
    configs = pathlib.Path(importlib.import_module('configs').__file__).parent.glob('*.py')
    assert set(FULL) == {path.stem for path in configs} - {'__init__'}


# The published sizes, from nothing.


def published(name: str, preset: str, **changes: Any) -> tuple[runner.Training, loop.Arguments]:
    """Return a program and its arguments on a slice of 16 chips that is only a name."""
    settings = settings_of(name, preset)
    settings.loop.batch_size = CHIPS
    settings.update(changes)
    abstract = runner.size(name, settings)
    mesh: Any = AbstractMesh((1, CHIPS, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    frozen = abstract.program.frozen()
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) or leaf.size <= SMALL for leaf in jax.tree.leaves(frozen))
    return abstract, loop.abstract_arguments(abstract.program, frozen, abstract.source, abstract.run, mesh)


@pytest.mark.parametrize(
    ('name', 'preset', 'changes', 'billions'),
    [
        ('autoencoder', 'full', {}, 0.336),
        ('decoder', 'full', {}, 0.010),
        ('decoder', 'full', {'decoder': {'native_weight': 1.0}}, 0.010),
        ('dmd', 'full', {}, 2 * 1.518),
        ('pruning', 'stage1', {}, 1.518),
        ('pruning', 'stage2', {}, 1.518),
        ('super_resolution', 'full', {}, 0.00005),
        ('teacher', 'full', {}, 2.028),
        ('text', 'full', {}, None),
        ('text', 'full', {'cached': True}, None),
        ('text', 'full', {'text': {'encoder': 'lora', 'adapter': 'none'}}, None),
        ('text', 'full', {'text': {'encoder': 'trained'}}, None),
    ],
)
def test_all_large_parameters_have_a_place_on_a_slice(name, preset, changes, billions):
    abstract, arguments = published(name, preset, **changes)
    held = {'state': arguments.carry.state, 'frozen': arguments.frozen}
    for path, leaf in jax.tree_util.tree_leaves_with_path(held):
        assert leaf.size <= SMALL or 'fsdp' in leaf.sharding.spec, path_name(path)
    assert sum(variants(abstract.program).values()) == pytest.approx(1)
    if billions is not None:
        state = arguments.carry.state
        trained = [getattr(state, field) for field in ('params', 'student', 'fake') if hasattr(state, field)]
        tables = [leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(trained) if 'positions' in str(path)]
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained)) - sum(tables)
        assert count / 1e9 == pytest.approx(billions, rel=0.02)


def test_text_embedder_is_split_by_the_rows_that_its_input_has():
    _, arguments = published('text', 'full')
    assert tuple(arguments.frozen['embedder']['kernel'].sharding.spec) == ('fsdp',)
    assert tuple(arguments.frozen['teacher']['block_0']['mlp_gate']['kernel'].sharding.spec) == ('fsdp', 'tensor')


# The miniatures, beside the real programs.

Real = Callable[[ConfigDict, pathlib.Path], tuple[Any, Any]]


def stored(folder: pathlib.Path, sample: dict[str, Any]) -> str:
    """Write a dataset of one sample, many times, with itself as its conditionings."""
    specs = {name: ArraySpec(np.shape(value), str(value.dtype)) for name, value in sample.items()}
    with SampleWriter(folder, RecordSpec(specs), 40, protocol={'world': 'nothing'}) as writer:
        given = {name: value for name, value in sample.items() if name not in ('latents', 'units', 'ids')}
        writer.write_conditioning('null', given)
        for index in writer.missing():
            writer.append(sample | {'index': index, 'prompt': 'nothing'})
    return str(folder)


def loaded(name: str, settings: ConfigDict) -> tuple[Any, Any]:
    """Return the program and the source that a run would have."""
    recipe = recipe_of(name)
    program, source, _ = recipe.load(recipe.read(settings))
    return program, source


def real_dmd(settings: ConfigDict, folder: pathlib.Path) -> tuple[Any, Any]:
    del folder
    settings.update({'data': 'unused', 'workdir': 'unused', 'checkpoint': str(TINY_CHECKPOINT)})
    source = runner.size('dmd', settings).source
    return dmd.DMD(dmd.RECIPE.read(settings).dmd, source[0], 3), source


def real_teacher(settings: ConfigDict, folder: pathlib.Path) -> tuple[Any, Any]:
    config = teacher_program.RECIPE.read(settings).teacher
    data = stored(folder, runner.size('teacher', settings).source[0])
    return teacher_program.load_program(config, [data], [1.0])


def going_on(settings: ConfigDict, folder: pathlib.Path) -> tuple[Any, Any]:
    settings.teacher.update({'start': denoiser(folder), 'sizes': {'num_layers': 7}})
    return real_teacher(settings, folder / 'data')


def real_pruning(settings: ConfigDict, folder: pathlib.Path) -> tuple[Any, Any]:
    sample = runner.size('teacher', settings_of('teacher', 'tiny')).source[0]
    settings.update({'denoiser': denoiser(folder), 'keep': '1,2', 'workdir': 'unused'})
    settings.data = stored(folder / 'data', sample)
    return loaded('pruning', settings)


def denoiser(folder: pathlib.Path) -> str:
    """Write a denoiser of three blocks."""
    values = teacher_config.TINY['teacher']['sizes'] | {'num_layers': 3, 'in_channels': 16}
    sizes = MMDiTConfig(**values)
    checkpoint.save(folder / 'denoiser', PyramidMMDiT(sizes), random_params('PyramidMMDiT', sizes, 0))
    return str(folder / 'denoiser')


def real_text(settings: ConfigDict, folder: pathlib.Path) -> tuple[Any, Any]:
    random_teacher.write(folder)
    settings.update({'encoder': str(TINY_CHECKPOINT / 'text_encoder_3'), 'start': ''})
    settings.update({'embedder': str(folder / random_teacher.DENOISER)})
    settings.update({'teacher': str(folder / random_teacher.TEXT_ENCODER)})
    settings.data = stored(folder / 'data', runner.size('text', settings).source[0])
    return loaded('text', settings)


def real_autoencoder(settings: ConfigDict, folder: pathlib.Path) -> tuple[Any, Any]:
    del folder
    return loaded('autoencoder', settings)


def real_decoder(settings: ConfigDict, folder: pathlib.Path) -> tuple[Any, Any]:
    sizes = settings_of('autoencoder', 'tiny').autoencoder.sizes.to_dict()
    module = NativeVAE(PyramidFlowVAEConfig(**sizes))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, leaf.dtype), abstract_params(module))
    checkpoint.save(folder, module, params)
    settings.decoder.update({'start': str(folder), 'native_weight': 1.0})
    return loaded('decoder', settings)


def real_super_resolution(settings: ConfigDict, folder: pathlib.Path) -> tuple[Any, Any]:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / 'picture.png')
    settings.data = str(folder)
    return loaded('super_resolution', settings)


TINY: dict[str, tuple[str, str, Real]] = {
    'autoencoder': ('autoencoder', 'tiny', real_autoencoder),
    'decoder': ('decoder', 'tiny', real_decoder),
    'dmd': ('dmd', 'tiny', real_dmd),
    'pruning, stage 1': ('pruning', 'stage1-tiny', real_pruning),
    'pruning, stage 2': ('pruning', 'stage2-tiny', real_pruning),
    'super_resolution': ('super_resolution', 'tiny', real_super_resolution),
    'teacher': ('teacher', 'tiny', real_teacher),
    'teacher going on': ('teacher', 'tiny', going_on),
    'text': ('text', 'tiny', real_text),
}


@pytest.mark.long
@pytest.mark.parametrize(('name', 'preset', 'real'), TINY.values(), ids=TINY)
def test_miniature_has_the_shapes_of_the_real_program_and_its_steps_trace(name, preset, real, tmp_path):
    settings = settings_of(name, preset)
    program, source = real(settings, tmp_path)
    abstract = runner.size(name, settings)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    want = loop.abstract_arguments(program, program.frozen(), source, abstract.run, mesh)
    got = loop.abstract_arguments(abstract.program, abstract.program.frozen(), abstract.source, abstract.run, mesh)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(got.carry) == shapes(want.carry)
    assert shapes(got.frozen) == shapes(want.frozen)
    # Stored samples also hold their index.
    places = {key: leaf for key, leaf in want.batch.items() if key not in ('index', 'source')}
    assert shapes({key: got.batch[key] for key in places}) == shapes(places) and set(got.batch) <= set(want.batch)
    frozen = jax.tree.leaves({key: tree for key, tree in abstract.program.frozen().items() if key != 'negative'})
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) or leaf.size <= 3 for leaf in frozen)  # a mean color is measured
    variant = list(variants(abstract.program))[-1]
    carry, metrics = jax.eval_shape(functools.partial(loop.guarded_step, abstract.program, variant), *got)
    assert shapes(carry) == shapes(got.carry) and metrics


def test_arithmetic_does_not_depend_on_how_memory_is_saved():
    settings = settings_of('super_resolution', 'tiny')
    assert jobs.model_flops('super_resolution', settings, 1)[0] > 0
    settings = settings_of('decoder', 'tiny')
    settings.update({'clips': {'frames': 9, 'height': 16, 'width': 16, 'held_out': 1}})
    plain = jobs.model_flops('decoder', settings, 4)
    settings.decoder.update({'accumulate': 4, 'memory': {'blocks': True, 'window': 8}})
    assert jobs.model_flops('decoder', settings, 4) == plain


@pytest.mark.parametrize(
    ('name', 'preset'),
    [
        pytest.param('dmd', f'tiny-{recipe}', marks=[] if recipe == 'consistency' else pytest.mark.long)
        for recipe in ('paper', *RECIPES)
    ]
    + [
        pytest.param(name, preset, marks=pytest.mark.long)
        for name, preset in (('teacher', 'tiny'), ('pruning', 'stage2-tiny'))
    ],
)
def test_every_recipe_traces_with_the_attention_of_tpus(name, preset):
    """A kernel has no derivative in forward mode, for example."""
    settings = settings_of(name, preset)
    sections = [section for _, section in jobs.sections(settings, ('attention',))]
    for section in sections:
        section.attention = 'splash'
    assert sections
    abstract = runner.size(name, settings)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arguments = loop.abstract_arguments(
        abstract.program, abstract.program.frozen(), abstract.source, abstract.run, mesh
    )
    variant = abstract.program.variant(0)
    _, metrics = jax.eval_shape(functools.partial(loop.guarded_step, abstract.program, variant), *arguments)
    assert metrics


@pytest.mark.parametrize(
    ('name', 'changes', 'message'),
    [
        (
            'teacher',
            {'teacher': {'start': str(TINY_CHECKPOINT / 'text_encoder_3')}},
            'pass the folder of a PyramidMMDiT or PyramidDiffusionMMDiT',
        ),
        ('text', {'teacher': str(TINY_CHECKPOINT / 'text_encoder_3')}, 'pass the folder of a T5EncoderModel'),
        ('text', {'encoder': str(TINY_CHECKPOINT / 'text_encoder_3')}, 'use the parts of one system'),
        ('pruning', {'keep': '0,1'}, 'the last block, 23, ends the text stream'),
        ('super_resolution', {'crops': {'size': 127}}, 'no multiple of the scaling factor 2'),
    ],
)
def test_what_does_not_fit_is_refused_without_data(name, changes, message):
    settings = settings_of(name, FULL[name])
    settings.update(changes)
    with pytest.raises(InputError, match=message) as error:
        runner.size(name, settings)
    assert '\n' not in str(error.value)
