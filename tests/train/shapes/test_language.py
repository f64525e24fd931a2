"""Text side of moving shapes: the tokenizers lose no word, and the random encoders separate captions."""

from __future__ import annotations

import numpy as np
import pytest

from neodragon_jax.generation.tokens import ClipTokenizer, T5Tokenizer
from train.data.conditioning import load_conditioner
from train.shapes import language, text_encoders
from train.shapes.captions import caption
from train.shapes.world import CPU, GPU, Traits


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('language')
    assert language.main(['--out', str(folder)]) == 0
    return folder


def test_every_caption_fits_and_has_no_unknown_word(root):
    tokenizer = T5Tokenizer.load(root / 'tokenizer_3')
    assert tokenizer.length == text_encoders.LENGTH
    texts = [caption(traits, (7, row)) for world in (CPU, GPU) for row, traits in enumerate(world.combinations('all'))]
    ids, mask = tokenizer(texts)
    unknown = tokenizer.backend.unk_token_id
    assert ids.shape == (len(texts), text_encoders.LENGTH) and not (ids == unknown).any()
    # Nothing was cut: the last valid token of each is the end.
    last = ids[np.arange(len(ids)), mask.sum(axis=1) - 1]
    assert (last == tokenizer.backend.eos_token_id).all()
    assert tokenizer.backend.decode(ids[0], skip_special_tokens=True) == texts[0]
    assert (tokenizer(['a purple dog'])[0] == unknown).sum() == 2


def test_clip_ends_with_its_largest_token(root):
    tokenizer = ClipTokenizer.load(root / 'tokenizer')
    ids = tokenizer(['a small red circle moves right', 'zebra'])
    assert ids.shape == (2, 77) and (ids[:, -1] == ids.max()).all() and ids.max() == len(tokenizer.backend) - 1
    assert tokenizer.backend.decode(ids[0], skip_special_tokens=True).strip() == 'a small red circle moves right'


@pytest.mark.parametrize('encoder', ['t5', 'text_encoder_3'])
def test_random_features_tell_attributes_of_unseen_combinations(root, encoder):
    """A linear map from pooled vectors and mean states, fitted on the training split, reads the held-out one."""
    conditioner = load_conditioner(root, 't5', text_encoder=root / encoder, batch=32)
    seen, wanted = ({}, {})
    for split, wordings in (('train', 12), ('held_out', 4)):
        combinations = [traits for traits in CPU.combinations(split) for _ in range(wordings)]
        texts = [caption(traits, (row, split == 'train')) for row, traits in enumerate(combinations)]
        size = conditioner.batch or len(texts)
        rows = [conditioner(texts[start : start + size]) for start in range(0, len(texts), size)]
        arrays = {name: np.concatenate([row[name] for row in rows]) for name in ('t5', 'text_mask', 'pooled')}
        valid = arrays['text_mask'][..., None]
        states = (arrays['t5'] * valid).sum(axis=1) / valid.sum(axis=1)
        seen[split] = np.concatenate([states, arrays['pooled'], np.ones((len(texts), 1))], axis=1)
        wanted[split] = np.array([CPU.numbers(traits) for traits in combinations])
    for place, name in enumerate(Traits._fields):
        labels = wanted['train'][:, place]
        weights = np.linalg.lstsq(seen['train'], np.eye(labels.max() + 1)[labels], rcond=1e-4)[0]
        right = np.argmax(seen['held_out'] @ weights, axis=1) == wanted['held_out'][:, place]
        assert right.mean() > 0.9, (name, right.mean())


def test_what_is_there_is_not_written_again(root):
    stamp = (root / 't5' / 'model.safetensors').stat().st_mtime_ns
    text_encoders.write(root, seed=5)
    assert (root / 't5' / 'model.safetensors').stat().st_mtime_ns == stamp
