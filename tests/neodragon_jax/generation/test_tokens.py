"""Tests of the tokenizers against the golden ids, and of errors for damaged checkpoints."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.generation.tokens import DEFAULT_MODIFIER, ClipTokenizer, T5Tokenizer, Tokenizers, cut_notice
from support.goldens import GOLDENS, TINY_CHECKPOINT

PROMPTS = json.loads((GOLDENS / 'tiny_checkpoint_golden.json').read_text())['prompts']


@pytest.fixture(scope='module')
def tokenizers() -> Tokenizers:
    return Tokenizers.load(TINY_CHECKPOINT)


def test_ids_and_masks_match_golden(tokenizers):
    tokens = tokenizers(PROMPTS)
    assert {array.dtype for array in tokens} == {np.dtype(np.int32)}
    with np.load(GOLDENS / 'tiny_checkpoint_golden.npz') as golden:
        for i in range(len(PROMPTS)):
            np.testing.assert_array_equal(tokens.clip_l_ids[i], golden[f'p{i}/tokenizer/input_ids'][0])
            np.testing.assert_array_equal(tokens.clip_g_ids[i], golden[f'p{i}/tokenizer_2/input_ids'][0])
            np.testing.assert_array_equal(tokens.t5_ids[i], golden[f'p{i}/tokenizer_3/input_ids'][0])
            np.testing.assert_array_equal(tokens.t5_mask[i], golden[f'p{i}/prompt_mask'][0])


def test_long_prompts_are_cut_before_the_end_token(tokenizers):
    tokens = tokenizers(PROMPTS[3:4])
    assert tokens.t5_mask.all()
    end = tokenizers([''])
    assert tokens.t5_ids[0, -1] == end.t5_ids[0, 0]
    assert tokens.clip_l_ids[0, -1] == end.clip_l_ids[0, 1]
    assert tokens.clip_g_ids[0, -1] == end.clip_g_ids[0, 1]


def test_cut_prompts_are_counted_with_an_example(tokenizers):
    long = 'word ' * 300
    assert cut_notice(tokenizers.t5, ['a cat', 'a dog']) == ''
    notice = cut_notice(tokenizers.t5, ['a cat', long, 'a dog'])
    assert notice.startswith('1 of 3 prompts have more than 128 tokens and are cut, such as "word word')
    assert cut_notice(tokenizers.t5, ['a cat', 'a dog'], ' and more' * 200).startswith('2 of 2 prompts')


def test_modifier_follows_every_prompt(tokenizers):
    prompts = PROMPTS[:3]
    modified = tokenizers(prompts, DEFAULT_MODIFIER)
    written_out = tokenizers([prompt + DEFAULT_MODIFIER for prompt in prompts])
    for got, want, plain in zip(modified, written_out, tokenizers(prompts), strict=True):
        np.testing.assert_array_equal(got, want)
        assert (got != plain).any(axis=-1).all()


@pytest.mark.parametrize('folder', ['ssd_1b_tokenizer', 'ssd_1b_tokenizer_2'])
def test_first_frame_tokenizers_equal_those_of_the_video(tokenizers, folder):
    twin = tokenizers.clip_g if folder.endswith('_2') else tokenizers.clip_l
    np.testing.assert_array_equal(ClipTokenizer.load(TINY_CHECKPOINT / folder)(PROMPTS), twin(PROMPTS))


def test_clip_text_is_repaired_first(tokenizers):
    # Typographic quotes, and UTF-8 that was once read as Windows-1252.
    np.testing.assert_array_equal(
        tokenizers.clip_l(['the astronaut’s “visor”', 'a cafÃ© in the rain']),
        tokenizers.clip_l(['the astronaut\'s "visor"', 'a café in the rain']),
    )


@pytest.mark.parametrize(
    ('prompts', 'message'),
    [
        ('a dog', 'prompts is one text'),
        ([], 'prompts is empty'),
        (['a dog', None], r'prompts\[1\] is of type NoneType'),
    ],
)
def test_prompts_must_be_a_list_of_texts(tokenizers, prompts, message):
    with pytest.raises(InputError, match=message):
        tokenizers(prompts)
    with pytest.raises(InputError, match=message):
        tokenizers.t5(prompts)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tokenizers, to be damaged."""
    for name in ('tokenizer', 'tokenizer_2', 'tokenizer_3'):
        shutil.copytree(TINY_CHECKPOINT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    'damaged',
    [
        'tokenizer/vocab.json',
        'tokenizer/merges.txt',
        'tokenizer_2/tokenizer_config.json',
        'tokenizer_3/spiece.model',
        'tokenizer_3/tokenizer_config.json',
    ],
)
def test_missing_empty_and_unreadable_files_are_named(checkpoint, damaged):
    path = checkpoint / damaged
    path.write_text('version https://git-lfs.github.com/spec/v1')
    with pytest.raises(InputError, match=f'{path.parent}.* cannot be read as a tokenizer') as error:
        Tokenizers.load(checkpoint)
    assert path.name in str(error.value)
    path.write_bytes(b'')
    with pytest.raises(InputError, match=f'{path}: the file is empty'):
        Tokenizers.load(checkpoint)
    path.unlink()
    with pytest.raises(InputError, match=f'{path}: the file is missing'):
        Tokenizers.load(checkpoint)


def test_missing_folder_is_named(checkpoint):
    shutil.rmtree(checkpoint / 'tokenizer_3')
    with pytest.raises(InputError, match='tokenizer_3: no such tokenizer folder'):
        Tokenizers.load(checkpoint)


def test_serialized_backend_replaces_the_vocabulary_files(tokenizers, checkpoint):
    for name, loaded in (('tokenizer_2', tokenizers.clip_g), ('tokenizer_3', tokenizers.t5)):
        loaded.backend.backend_tokenizer.save(str(checkpoint / name / 'tokenizer.json'))
    for vocabulary in ('tokenizer_2/vocab.json', 'tokenizer_2/merges.txt', 'tokenizer_3/spiece.model'):
        (checkpoint / vocabulary).unlink()
    np.testing.assert_array_equal(ClipTokenizer.load(checkpoint / 'tokenizer_2')(PROMPTS), tokenizers.clip_g(PROMPTS))
    for got, want in zip(T5Tokenizer.load(checkpoint / 'tokenizer_3')(PROMPTS), tokenizers.t5(PROMPTS), strict=True):
        np.testing.assert_array_equal(got, want)


# Importing must not import transformers; loading must neither contact a hub nor print.
LOAD_OFFLINE = """
import socket, sys
import neodragon_jax.generation.tokens as tokens
assert not {'jax', 'ftfy', 'transformers'} & set(sys.modules), 'heavy import'
def refuse(*args, **kwargs):
    raise AssertionError('network access')
socket.socket.connect = socket.getaddrinfo = refuse
print(tokens.Tokenizers.load(sys.argv[1])(['a dog']).t5_mask.sum())
"""


@pytest.mark.parametrize('encoder', ['text_encoder', 'text_encoder_3'])
def test_tokens_without_an_embedding_are_found_on_loading(tmp_path, encoder):
    """As the tokenizer of another model has them; the encoder's output would be NaN for some prompts."""
    root = pathlib.Path(shutil.copytree(TINY_CHECKPOINT, tmp_path / 'checkpoint'))
    path = root / encoder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'vocab_size': 500}))
    with pytest.raises(InputError, match=rf'has tokens up to number \d+, but {encoder} only 500 embeddings'):
        Tokenizers.load(root)
    # Tokenizers alone can be used to count tokens.
    shutil.rmtree(root / encoder)
    Tokenizers.load(root)


def test_import_is_light_and_loading_is_offline_and_quiet():
    environment = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'TRANSFORMERS_'))}
    result = subprocess.run(
        [sys.executable, '-c', LOAD_OFFLINE, str(TINY_CHECKPOINT)], capture_output=True, text=True, env=environment
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, '3\n', '')
