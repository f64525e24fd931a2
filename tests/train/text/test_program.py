"""The text-encoder distillation: the deployed models, and the program."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import text as text_settings
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.classes import COMPONENTS
from neodragon_jax.checkpoint.random_params import random_params
from neodragon_jax.config.neodragon import T5Config, T5EncoderConfig
from neodragon_jax.config.pyramid_flow import TeacherMMDiTConfig
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.t5 import T5EncoderWithProjection
from support.glossary import unexplained
from support.goldens import relative_error
from support.training_runs import copy_killed, digests
from train import text_states
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter
from train.data.record_spec import T5_STATES
from train.runtime.metrics import read_metrics
from train.runtime.sharding import AXES, make_mesh, put, to_host
from train.runtime.step import abstract_arguments, initial, jit_step
from train.text import losses
from train.text import program as text
from train.text.parts import TextParts, deployed_adapter

VOCABULARY, TOKENS, STATES, WIDTH, PROMPTS, BATCH = 24, 6, 20, 16, 40, 8
SMALL = {'vocab_size': VOCABULARY, 'd_kv': 4, 'd_ff': 12, 'num_layers': 1, 'num_heads': 2}
PARTS = {
    'encoder': ('T5EncoderWithProjection', T5Config(d_model=8, out_dim=STATES, dropout_rate=0.1, **SMALL)),
    'teacher': ('T5EncoderModel', T5EncoderConfig(d_model=STATES, **SMALL)),
    'embedder': (
        'PyramidDiffusionMMDiT',
        TeacherMMDiTConfig(
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            sample_size=4,
            pos_embed_max_size=2,
            joint_attention_dim=STATES,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=4,
        ),
    ),
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> dict[str, str]:
    """Component folders of the given models with random weights, and prompts of random tokens."""
    root, rng = tmp_path_factory.mktemp('text'), np.random.default_rng(0)
    for seed, (name, (kind, config)) in enumerate(PARTS.items()):
        params = random_params(kind, config, seed)
        for tree in (params, params.get('encoder', {})):
            if 'token_embedding' in tree:
                tree['token_embedding']['embedding'] *= 50
        checkpoint.save(root / name, COMPONENTS[kind].build(config), params)
    spec = RecordSpec({name: ArraySpec((TOKENS,), 'int32') for name in (text.IDS, text.MASK)})
    with SampleWriter(root / 'data', spec, PROMPTS, protocol={'prompts': 'random'}) as writer:
        for index in writer.missing():
            length = rng.integers(2, TOKENS + 1)
            valid = (np.arange(TOKENS) < length).astype(np.int32)
            ids = rng.integers(1, VOCABULARY, TOKENS).astype(np.int32) * valid
            writer.append({'index': index, 'prompt': f'prompt {index}', text.IDS: ids, text.MASK: valid})
    return {name: str(root / name) for name in (*PARTS, 'data')} | {'start': ''}


def settings(folders, workdir='unused', steps: int = 1, mesh=(1, 1, 1), **objective):
    config = text_settings.get_config('tiny')
    run = {'steps': steps, 'batch_size': BATCH, 'mesh': dict(zip(AXES, mesh, strict=True)), 'log_every': 1}
    run |= {'checkpoint_every': 100, 'evaluate_every': 0}
    objective = {'hidden': (24, 24), 'held_out': 8, 'held_out_batch': 4, 'lora': {'rank': 2}} | objective
    objective |= {'optimizer': {'learning_rate': 1e-2, 'warmup_steps': 0}}
    config.update(folders | {'workdir': str(workdir), 'text': objective, 'loop': run})
    return config


@functools.cache
def cached_program(adapter: str, encoder: str, *items: tuple[str, str]) -> text.TextDistillation:
    folders = dict(items)
    return loaded(settings(folders, adapter=adapter, encoder=encoder)).program


def loaded(config) -> Any:
    return text.RECIPE.load(text.RECIPE.read(config))


def program_for(folders, adapter: str = 'replace', encoder: str = 'frozen') -> text.TextDistillation:
    return cached_program(adapter, encoder, *folders.items())


def example_batch(folders) -> dict[str, jax.Array]:
    rows = [SampleSource(folders['data'])[index] for index in range(BATCH)]
    return {name: jnp.stack([jnp.asarray(row[name]) for row in rows]) for name in (text.IDS, text.MASK)}


# --- Learned and deployed models --------------------------------------------------------------------------------------

MODES = [('replace', 'frozen'), ('extend', 'frozen'), ('none', 'lora'), ('replace', 'trained'), ('extend', 'lora')]


def perturbed(params, seed: int = 9):
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(seed), leaf.shape), params)


@pytest.mark.parametrize(('adapter', 'encoder'), MODES)
def test_what_is_deployed_is_what_was_trained(folders, tmp_path, adapter, encoder):
    """The stored encoder and the stored adapter, run as the pipeline runs them, give the student's embedding."""
    program, batch = program_for(folders, adapter, encoder), example_batch(folders)
    state = program.init_state(jax.random.key(0), jax.tree.map(jnp.asarray, program.frozen()))
    assert set(state.params) == {'adapter'} - {adapter and 'adapter' if adapter == 'none' else ''} | (
        {'encoder'} if encoder == 'trained' else {'lora'} if encoder == 'lora' else set()
    )
    state = state.replace(params=perturbed(state.params))  # pyright: ignore[reportAttributeAccessIssue]
    program.finish(state, tmp_path)
    want = program.embed(state.params, program.frozen(), batch)

    folder = folders['encoder'] if encoder == 'frozen' else tmp_path / 'text_encoder_3'
    module, params = checkpoint.load(folder)
    assert isinstance(module, T5EncoderWithProjection)
    stored, stored_params = checkpoint.load(tmp_path / 'context_adapter_multistep_t2v')
    assert isinstance(stored, ContextAdapter)
    assert (stored.config.input_dims, stored.config.output_dims) == (STATES, WIDTH)
    states = jax.jit(module.apply)({'params': params}, batch[text.IDS], batch[text.MASK])
    assert relative_error(stored.apply({'params': stored_params}, states), want) < 1e-5
    assert (tmp_path / text.LORA_FILE).exists() == (encoder == 'lora')
    if adapter == 'extend':
        alone, _ = checkpoint.load(tmp_path / 'extending_adapter')
        assert alone.config.output_dims == STATES  # pyright: ignore[reportAttributeAccessIssue]
    if encoder == 'lora':
        tensors = safetensors.numpy.load_file(tmp_path / text.LORA_FILE)
        before = checkpoint.load(folders['encoder'])[1]['encoder']['block_0']['attention']['query']['kernel']
        at = 'encoder/block_0/attention/query/lora_'
        scale = program.config.lora.alpha / program.config.lora.rank
        want = before + scale * tensors[f'{at}down'] @ tensors[f'{at}up']
        assert relative_error(params['encoder']['block_0']['attention']['query']['kernel'], want) < 1e-6


def test_the_target_is_the_embedded_teacher(folders):
    program, batch = program_for(folders), example_batch(folders)
    module, params = checkpoint.load(folders['teacher'])
    denoiser, denoiser_params = checkpoint.load(folders['embedder'])
    states = jax.jit(module.apply)({'params': params}, batch[text.IDS], batch[text.MASK])
    want = denoiser.apply({'params': denoiser_params}, states, method='embed_text')
    assert relative_error(program.target(program.frozen(), batch), want) < 1e-6


def test_stored_states_take_the_teachers_place(folders, tmp_path):
    out = tmp_path / 'states'
    arguments = ['--data', folders['data'], '--teacher', folders['teacher'], '--out', str(out), '--batch', '8']
    assert text_states.main([*arguments, '--dtype', 'float32', '--store-dtype', 'float32']) == 0
    source = SampleSource(out)
    assert len(source) == PROMPTS and source[3]['prompt'] == 'prompt 3'
    program = loaded(settings(folders | {'data': str(out), 'teacher': ''})).program
    batch = example_batch(folders) | {T5_STATES: jnp.stack([source[index][T5_STATES] for index in range(BATCH)])}
    live = program_for(folders)
    assert 'teacher' not in program.frozen()
    mask = batch[text.MASK][..., None]
    got, want = (each.target(each.frozen(), batch) * mask for each in (program, live))
    assert relative_error(got, want) < 1e-5
    with pytest.raises(InputError, match=r'its samples have no t5; pass a folder of train\.text_states'):
        loaded(settings(folders | {'teacher': ''}))


def test_dropout_is_for_trained_encoders(folders):
    batch, key = example_batch(folders), jax.random.key(3)
    program = program_for(folders, 'replace', 'trained')
    params = program.init_state(key, jax.tree.map(jnp.asarray, program.frozen())).params
    embed = lambda dropout_key: program.embed(params, program.frozen(), batch, dropout_key)
    assert relative_error(embed(key), embed(None)) > 1e-3
    assert np.array_equal(embed(None), program_for(folders).embed(params, program.frozen(), batch))


# --- The program ------------------------------------------------------------------------------------------------------


@functools.cache
def placed_step(mesh_sizes: tuple[int, int, int], *items: tuple[str, str]):
    """Return (step, first carry, frozen, batch, key) on a mesh."""
    folders = dict(items)
    program, source, run = loaded(settings(folders, mesh=mesh_sizes, encoder='lora'))
    abstract = abstract_arguments(program, program.frozen(), source, run, make_mesh(run.mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    frozen = put(program.frozen(), shardings.frozen)
    begin = jax.jit(functools.partial(initial, program), out_shardings=shardings.carry)
    given = example_batch(folders) | {'index': jnp.arange(BATCH)}
    batch = put({name: given[name] for name in abstract.batch}, shardings.batch)
    key = jax.device_put(jax.random.key(1), shardings.root_key)
    return jit_step(program, 0, abstract), begin(jax.random.key(0), frozen), frozen, batch, key


def test_meshes_agree(folders):
    results = []
    for mesh_sizes in ((1, 1, 1), (2, 2, 2)):
        step, carry, frozen, batch, key = placed_step(mesh_sizes, *folders.items())
        carry, first = step(carry, frozen, batch, key)
        carry, second = step(carry, frozen, batch, key)
        results.append(to_host((first, second, carry.state.params)))
    (*want_metrics, want), (*metrics, got) = results
    for got_step, want_step in zip(metrics, want_metrics, strict=True):
        for name, value in want_step.items():
            assert got_step[name] == pytest.approx(value, rel=1e-4), name
    errors = jax.tree.map(relative_error, got, want)
    assert max(jax.tree.leaves(errors)) < 2e-3


@pytest.fixture(scope='module')
def unbroken(folders, tmp_path_factory):
    """A run of 60 steps with an evaluation at 20 and the end."""
    workdir = tmp_path_factory.mktemp('unbroken')
    config = settings(folders, workdir, steps=60)
    config.loop.update({'evaluate_every': 20, 'checkpoint_every': 30})
    text.RECIPE.run(config)
    return workdir


def test_it_learns(unbroken):
    rows = [row for row in read_metrics(unbroken) if 'loss' in row]
    mean = lambda name, part: np.mean([row[name] for row in part])
    for name in ('loss', 'embedding_mse', 'cosine_distance'):
        assert mean(name, rows[-10:]) < 0.5 * mean(name, rows[:5]), name
    for row in rows:
        assert row['loss'] == pytest.approx(row['embedding_mse'] + 0.1 * row['cosine_distance'], rel=1e-5)
    first, *_, last = [row for row in read_metrics(unbroken) if 'eval/retrieval/top1' in row]
    assert not unexplained({*rows[0], *last})
    assert last['eval/embedding_mse'] < first['eval/embedding_mse']
    assert last['eval/retrieval/mean_rank'] <= first['eval/retrieval/mean_rank']
    assert last['eval/retrieval/top1'] > 0.3 > 1 / 8


def test_evaluation_is_that_of_the_result(folders, unbroken):
    last = [row for row in read_metrics(unbroken) if 'eval/retrieval/top1' in row][-1]
    program = program_for(folders)
    assert program.held_out is not None
    held_out = {name: jnp.asarray(array) for name, array in program.held_out.items()}
    assert held_out[text.IDS].shape == (8, TOKENS)
    adapter, params = checkpoint.load(unbroken / 'result' / 'context_adapter_multistep_t2v')
    states = program.encoder.apply({'params': program.parts.encoder_params}, held_out[text.IDS], held_out[text.MASK])
    student = np.asarray(adapter.apply({'params': params}, states))
    teacher = np.asarray(program.target(program.frozen(), held_out))
    mask = np.asarray(held_out[text.MASK])[..., None]
    pooled = [(states * mask).sum(axis=1) / mask.sum(axis=1) for states in (student, teacher)]
    distance = np.linalg.norm(pooled[0][:, None] - pooled[1][None], axis=-1)
    assert last['eval/retrieval/top1'] == np.mean(distance.argmin(axis=1) == np.arange(8))
    product = np.sum(student * teacher, axis=-1)
    cosines = product / np.linalg.norm(student, axis=-1) / np.linalg.norm(teacher, axis=-1)
    valid = np.asarray(held_out[text.MASK]) != 0
    assert last['eval/cosine_distance/p99'] == pytest.approx(np.quantile(1 - cosines[valid], 0.99), rel=1e-4)


def test_resumed_run_ends_where_an_unbroken_one_does(folders, unbroken, tmp_path):
    text.RECIPE.run(settings(folders, copy_killed(unbroken, 30, tmp_path), steps=60))
    assert digests(tmp_path / 'result') == digests(unbroken / 'result')
    record = json.loads((tmp_path / 'result' / 'text.json').read_text())
    assert record['adapter'] == 'replace' and record['iterations'] == 60 and 'lora' not in record


@pytest.mark.parametrize('part', ['teacher', 'embedder', 'encoder'])
def test_a_run_does_not_continue_with_another_model(folders, unbroken, tmp_path, part):
    kind, config = PARTS[part]
    checkpoint.save(tmp_path / part, COMPONENTS[kind].build(config), random_params(kind, config, seed=99))
    changed = folders | {part: str(tmp_path / part)}
    with pytest.raises(InputError, match=f'trained with other frozen weights, .*{part}'):
        text.RECIPE.run(settings(changed, copy_killed(unbroken, 30, tmp_path / 'run'), steps=60))


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_parts_that_do_not_fit_are_refused(folders):
    program = program_for(folders)
    with pytest.raises(InputError, match=r'the distilled encoder gives states of width 20, .* embedder takes 21'):
        TextParts(program.encoder, {}, {'kernel': np.zeros((21, 3)), 'bias': np.zeros(3)})
    with pytest.raises(InputError, match='holds a T5EncoderModel; pass the folder of a T5EncoderWithProjection'):
        text.read_parts(folders['teacher'], folders['embedder'], '', '', 'float32')
    with pytest.raises(InputError, match=r'config\.embedder is empty'):
        text.RECIPE.run(settings(folders | {'embedder': ''}))


@pytest.mark.parametrize('part', ['encoder', 'teacher'])
def test_prompts_of_another_tokenizer_are_refused(folders, tmp_path, part):
    kind, config = PARTS[part]
    smaller = dataclasses.replace(config, vocab_size=VOCABULARY // 2)
    checkpoint.save(tmp_path / part, COMPONENTS[kind].build(smaller), random_params(kind, smaller, seed=1))
    message = rf'tokens up to number \d+, but config\.{part} \S+ has embeddings of {VOCABULARY // 2} tokens: make'
    with pytest.raises(InputError, match=message):
        text.RECIPE.run(settings(folders | {part: str(tmp_path / part)}, tmp_path / 'run'))
    assert not list((tmp_path / 'run').glob('checkpoints'))


def test_an_adapter_without_layers_is_the_embedder():
    embedder = {'kernel': np.ones((5, 3), np.float32), 'bias': np.ones(3, np.float32)}
    adapter, params = deployed_adapter('none', None, {}, embedder)
    assert np.array_equal(adapter.apply({'params': params}, jnp.ones((2, 5))), np.full((2, 3), 6))
    assert losses.token_errors(*[jnp.ones((1, 1, 2))] * 2, jnp.ones((1, 1)))[0] == 0
