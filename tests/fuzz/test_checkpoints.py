"""Damaged checkpoints: every one is refused in one line that names the file, before its weights are read.

The tables have one case for each kind of damage; the seeded tests mix kinds and places. A case fails if anything but
InputError is raised, if it takes longer than LONGEST_S, or if damage that the headers show is accepted.
"""

from __future__ import annotations

import json
import pathlib
import random
import shutil
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.names.text import T5_TIED_NAMES
from neodragon_jax.checkpoint.weights import ZERO_AT_START
from neodragon_jax.generation.tokens import ClipTokenizer, T5Tokenizer
from support.goldens import TINY_CHECKPOINT
from support.mutations import TEXTS, change_header, change_value, join, split

COMPONENTS = (
    folders.STUDENT,
    folders.STUDENT_ADAPTER,
    folders.VIDEO_VAE,
    folders.CLIP_L,
    folders.T5,
    folders.FIRST_FRAME_UNET,
    folders.FIRST_FRAME_VAE,
)
ADAPTER = TINY_CHECKPOINT / folders.STUDENT_ADAPTER
LONGEST_S = 10.0


@pytest.fixture
def adapter(tmp_path) -> pathlib.Path:
    """A copy of a small component."""
    return pathlib.Path(shutil.copytree(ADAPTER, tmp_path / 'adapter'))


def weight_file(folder: pathlib.Path) -> pathlib.Path:
    (path,) = folder.glob('*.safetensors')
    return path


def refusal(load, *arguments) -> str:
    """Return the message with which a call refuses its input, or '' if it accepts it; nothing else may happen."""
    start = time.monotonic()
    try:
        load(*arguments)
        message = ''
    except InputError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 1000, message
        message.encode()
    assert time.monotonic() - start < LONGEST_S, message
    return message


# --- Weights: names, shapes, types and files -------------------------------------------------------------------------


def edit_header(folder, edit):
    header, data = split(weight_file(folder))
    edit(header)
    join(weight_file(folder), header, data)


def first(header, sides):
    """Return the entry of the first tensor with so many axes, which have different lengths."""
    return next(
        entry
        for name, entry in sorted(header.items())
        if name != '__metadata__' and len(entry['shape']) == sides and len(set(entry['shape'])) == sides
    )


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda header: first(header, 2)['shape'].reverse(), 'has shape .* config.json asks for'),
        (lambda header: first(header, 1)['shape'].append(1), r'has shape \[\d+, 1\]; config.json asks for \[\d+\]'),
        (lambda header: first(header, 1).update(dtype='I32'), 'is of type I32; supported: F16, BF16, F32, F64'),
        (lambda header: header.update({'more': header.pop(max(header))}), 'is missing|is not expected'),
    ],
    ids=['transposed', 'rank', 'integers', 'renamed'],
)
def test_header_of_another_model(adapter, edit, message):
    edit_header(adapter, edit)
    with pytest.raises(InputError, match=message):
        checkpoint.load(adapter)


@pytest.mark.parametrize('dtype', [np.int32, np.int64, np.bool_, np.uint8])
def test_tensors_that_are_no_floating_numbers(adapter, dtype):
    tensors = safetensors.numpy.load_file(weight_file(adapter))
    safetensors.numpy.save_file({name: tensor.astype(dtype) for name, tensor in tensors.items()}, weight_file(adapter))
    with pytest.raises(InputError, match=r'is of type .*; supported: F16, BF16, F32, F64'):
        checkpoint.load(adapter)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('everywhere', [True, False])
def test_numbers_that_are_not_finite(adapter, value, everywhere):
    tensors = safetensors.numpy.load_file(weight_file(adapter))
    name = max(tensors)
    tensors[name].reshape(-1)[slice(None) if everywhere else 0] = value
    safetensors.numpy.save_file(tensors, weight_file(adapter))
    with pytest.raises(InputError, match=f'tensor {name} has values that are not finite'):
        checkpoint.load(adapter)


def edit_tensors(folder: pathlib.Path, edit) -> None:
    tensors = safetensors.numpy.load_file(weight_file(folder))
    edit(tensors)
    safetensors.numpy.save_file(tensors, weight_file(folder))


@pytest.mark.parametrize(
    ('value', 'dtype'),
    [(1e300, np.float64), (3e38, np.float32), (-3e38, np.float32), (2e18, ml_dtypes.bfloat16)],
)
def test_numbers_too_large_to_compute_with(adapter, value, dtype):
    """They are finite in the file, but not as float32 or after the first product."""

    def edit(tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)
        tensors[max(tensors)].reshape(-1)[0] = value

    edit_tensors(adapter, edit)
    with pytest.raises(InputError, match=r'tensor .* has values of .*, beyond 1e\+18\. Copy the file again'):
        checkpoint.load(adapter)


def test_matrices_of_zeros(tmp_path, adapter):
    """A preallocated file whose download was interrupted; modulation is zero at the start of a training."""
    edit_tensors(adapter, lambda tensors: tensors.update({name: tensors[name] * 0 for name in tensors}))
    with pytest.raises(InputError, match='are all zeros, as an interrupted download'):
        checkpoint.load(adapter)
    denoiser = pathlib.Path(shutil.copytree(TINY_CHECKPOINT / 'diffusion_transformer_320p', tmp_path / 'denoiser'))
    at_start = lambda tensors: [name for name in tensors if ZERO_AT_START.fullmatch(name)]
    edit_tensors(denoiser, lambda tensors: tensors.update({name: tensors[name] * 0 for name in at_start(tensors)}))
    checkpoint.load(denoiser)
    # A small part that a model does not use may be zero.
    unused = lambda tensors: [name for name in tensors if 'time_text_embed.timestep_embedder' in name]
    edit_tensors(denoiser, lambda tensors: tensors.update({name: tensors[name] * 0 for name in unused(tensors)}))
    checkpoint.load(denoiser)
    path = weight_file(denoiser)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with pytest.raises(InputError, match='are all zeros, as an interrupted download'):
        checkpoint.load(denoiser)


def test_two_sets_of_weights(adapter):
    kept = weight_file(adapter)
    content = kept.read_bytes()
    index, weights = shard(adapter)
    index.write_text(json.dumps({'weight_map': weights}))
    module, params = checkpoint.load(adapter)
    kept.write_bytes(content)
    with pytest.raises(InputError, match=f'two sets of weights are in it, {kept.name} and {index.name}. Remove'):
        checkpoint.load(adapter)
    # Saving replaces whatever was there.
    checkpoint.save(adapter, module, params)
    checkpoint.load(adapter)
    assert not index.exists()


def test_two_names_of_one_tensor_that_differ(tmp_path):
    folder = pathlib.Path(shutil.copytree(TINY_CHECKPOINT / 'text_encoder_3', tmp_path / 't5'))
    alias, name = next(iter(T5_TIED_NAMES.items()))
    edit_tensors(folder, lambda tensors: tensors.update({alias: tensors[name].copy()}))
    checkpoint.load(folder)
    edit_tensors(folder, lambda tensors: tensors.update({alias: tensors[name] * 0}))
    with pytest.raises(InputError, match=f'tensors {name} and {alias} are two names of one tensor, but differ'):
        checkpoint.load(folder)


def shard(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, str]]:
    """Cut the weights into two shards; return the index and its weight map."""
    path = weight_file(folder)
    tensors = safetensors.numpy.load_file(path)
    names = sorted(tensors)
    parts = {'a.safetensors': names[:2], 'b.safetensors': names[2:]}
    for shard_name, inside in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in inside}, folder / shard_name)
    path.unlink()
    return folder / f'{path.name}.index.json', {name: part for part, inside in parts.items() for name in inside}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda weights, index: weights.update({min(weights): '../b.safetensors'}),
            r"shard '\.\./b\.safetensors' is not",
        ),
        (lambda weights, index: weights.update({min(weights): '/etc/passwd'}), "shard '/etc/passwd' is not"),
        (lambda weights, index: weights.update({min(weights): 'c.safetensors'}), 'its shard c.safetensors is missing'),
        (lambda weights, index: weights.update({min(weights): 'b.safetensors'}), 'not those in the index'),
        (lambda weights, index: weights.update(more='a.safetensors'), "not those in the index, such as 'more'"),
        (lambda weights, index: weights.pop(min(weights)), 'not those in the index'),
        (lambda weights, index: weights.update({min(weights): 3}), r'weight_map\[.*\] is 3; it must be a valid string'),
        (lambda weights, index: weights.clear(), 'its weight_map is empty'),
        (
            lambda weights, index: shutil.copy(index.parent / 'b.safetensors', index.parent / 'a.safetensors'),
            'not those in the index',
        ),
    ],
    ids=['outside', 'absolute', 'absent', 'elsewhere', 'unknown', 'unlisted', 'number', 'empty', 'twice'],
)
def test_index_that_does_not_fit_its_shards(adapter, change, message):
    index, weights = shard(adapter)
    index.write_text(json.dumps({'weight_map': weights}))
    checkpoint.load(adapter)
    change(weights, index)
    index.write_text(json.dumps({'weight_map': weights}))
    with pytest.raises(InputError, match=message):
        checkpoint.load(adapter)


def test_two_shards_with_one_tensor(adapter):
    index, weights = shard(adapter)
    both = safetensors.numpy.load_file(adapter / 'a.safetensors') | safetensors.numpy.load_file(
        adapter / 'b.safetensors'
    )
    name = min(weights)
    more = {key: both[key] for key in weights if weights[key] == 'b.safetensors'} | {name: both[name]}
    safetensors.numpy.save_file(more, adapter / 'b.safetensors')
    index.write_text(json.dumps({'weight_map': weights}))
    with pytest.raises(InputError, match='not those in the index, such as'):
        checkpoint.load(adapter)


@pytest.mark.parametrize('content', TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize('name', ['config.json', 'index'])
def test_files_that_are_no_json_object(adapter, name, content):
    path = adapter / name if name == 'config.json' else shard(adapter)[0]
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        checkpoint.load(adapter)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


# --- Mixed damage ----------------------------------------------------------------------------------------------------


def damaged_configs(tmp_path, seed: int, count: int, loaded: int) -> dict[bool, int]:
    """Open copies of components with one to three changed values in config.json.

    Args:
      loaded: number of accepted ones that are also loaded with their weights.
    Returns:
      refused -> how many.
    """
    rng, outcomes = random.Random(seed), {True: 0, False: 0}
    sources = [name for name in COMPONENTS if (TINY_CHECKPOINT / name).is_dir()]
    for name in sources:
        (tmp_path / name).mkdir()
        for path in (TINY_CHECKPOINT / name).glob('*.safetensors'):
            (tmp_path / name / path.name).symlink_to(path)
    for _ in range(count):
        folder = tmp_path / rng.choice(sources)
        values = json.loads((TINY_CHECKPOINT / folder.name / 'config.json').read_text())
        for _ in range(rng.choice([1, 1, 2, 3])):
            values = change_value(rng, values) if values else values
        (folder / 'config.json').write_text(json.dumps(values))
        message = refusal(checkpoint.load_module, folder)
        assert not message or str(folder) in message
        outcomes[bool(message)] += 1
        if not message and outcomes[False] <= loaded:
            refusal(checkpoint.load, folder)
    return outcomes


def damaged_headers(adapter, seed: int, count: int) -> None:
    """Load a component with a damaged header; all are refused."""
    rng, path = random.Random(seed), weight_file(adapter)
    for _ in range(count):
        shutil.copy(weight_file(ADAPTER), path)
        kind = change_header(rng, path)
        message = refusal(checkpoint.load, adapter)
        assert str(adapter) in message, kind


def damaged_tokenizers(tmp_path, seed: int, count: int) -> None:
    """Load and use tokenizers with a changed value in a JSON file, or with damaged bytes in any file."""
    rng = random.Random(seed)
    loaders = {folders.CLIP_L_TOKENIZER: ClipTokenizer.load, folders.T5_TOKENIZER: T5Tokenizer.load}

    def use(name, folder):
        loaders[name](folder)(['a small cat', ''])

    for name in loaders:
        use(name, TINY_CHECKPOINT / name)
    for index in range(count):
        name = rng.choice(list(loaders))
        folder = pathlib.Path(shutil.copytree(TINY_CHECKPOINT / name, tmp_path / f'{index}'))
        path = rng.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
        if path.suffix == '.json' and rng.random() < 0.7:
            path.write_text(json.dumps(change_value(rng, json.loads(path.read_text()))))
        else:
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        refusal(use, name, folder)
        shutil.rmtree(folder)


def damaged_bytes(adapter, seed: int, count: int) -> None:
    """Load a component with a few bytes of its weights' header, or of its config, overwritten or cut off."""
    rng = random.Random(seed)
    for _ in range(count):
        for path in (weight_file(ADAPTER), ADAPTER / 'config.json'):
            shutil.copy(path, adapter / path.name)
        path = adapter / rng.choice(['config.json', weight_file(ADAPTER).name])
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 2, 8])):
            content[rng.randrange(min(len(content), 2000))] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        refusal(checkpoint.load, adapter)


def test_damaged_configs(tmp_path):
    outcomes = damaged_configs(tmp_path, seed=0, count=400, loaded=15)
    assert outcomes[True] > outcomes[False]


def test_damaged_headers(adapter):
    damaged_headers(adapter, seed=1, count=60)


def test_damaged_bytes(adapter):
    damaged_bytes(adapter, seed=2, count=60)


def test_damaged_tokenizers(tmp_path):
    damaged_tokenizers(tmp_path, seed=6, count=60)


@pytest.mark.slow
def test_thousands_of_damaged_files(tmp_path, adapter):
    damaged_configs(tmp_path, seed=3, count=6000, loaded=300)
    damaged_headers(adapter, seed=4, count=600)
    damaged_bytes(adapter, seed=5, count=600)
    damaged_tokenizers(tmp_path / 'tokenizers', seed=7, count=600)
