"""Tokenizers and small random text encoders for the captions of moving shapes, in the released layout.

`tokenizer`, `tokenizer_2` and `tokenizer_3` split the captions; `text_encoder` and `text_encoder_2` are CLIP towers,
`text_encoder_3` is a fresh DT5, and `t5` the larger encoder that the teacher reads and DT5 is distilled from. None is
trained: random features keep the forty words apart, and the denoiser learns the language. Together they take 2.5 MB.

The T5 tokenizer has one token per word; its config limits a caption to `LENGTH` tokens.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from neodragon_jax.base.atomic import atomic_folder
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.classes import COMPONENTS
from neodragon_jax.checkpoint.random_params import SMALL, random_params
from neodragon_jax.config.neodragon import CLIPTextConfig, ComponentConfig, T5Config, T5EncoderConfig
from neodragon_jax.generation.tokens import import_transformers
from train.shapes.captions import SYNONYMS, caption
from train.shapes.world import WORLDS, World

# The longest caption has fourteen words, a comma and the end token; attention cost grows with every token.
LENGTH = 16
# The teacher's T5, in the folder of the same name.
TEACHER_ENCODER = 't5'
STATES_WIDTH, POOLED_WIDTH = 64, 64
# Wordings of every combination from which the vocabulary is learned.
WORDINGS = 8
# Scales random embeddings of deviation SMALL to deviation 1; unscaled, all tokens would look the same.
EMBEDDING_SCALE = 1 / SMALL

CLIP_SPECIALS = ('<|startoftext|>', '<|endoftext|>')
END_OF_WORD = '</w>'


def captions(world: World) -> Iterator[str]:
    """Yield some wordings of every combination."""
    for row, traits in enumerate(map(world.captioned, world.combinations('all'))):
        yield caption(traits)
        yield from (caption(traits, (row, wording)) for wording in range(WORDINGS))


def words(texts: Sequence[str]) -> list[str]:
    """Return the words and marks of some texts, sorted."""
    known = {word for group in SYNONYMS.values() for text in group for word in text.split()}
    return sorted(known.union(*(re.findall(r'\w+|[^\w\s]', text) for text in texts)))


def t5_tokenizer(vocabulary: Sequence[str]) -> Any:
    """Return a T5 tokenizer with one token per word."""
    # A mark follows its word without a space, so it has no space in front.
    pieces = [f'▁{word}' if word.isalnum() else word for word in vocabulary]
    specials = [(name, 0.0) for name in ('<pad>', '</s>', '<unk>', '▁')]
    return import_transformers().T5Tokenizer(
        vocab=[*specials, *((piece, -1.0) for piece in pieces)], extra_ids=0, model_max_length=LENGTH
    )


def clip_tokenizer(texts: Sequence[str]) -> Any:
    """Return a CLIP tokenizer whose byte pairs are learned from some texts."""
    backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, end_of_word_suffix=END_OF_WORD, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    learned = vocabulary_and_merges(backend)
    # The end token has the largest id, as released: a tower without a configured end token takes the largest id.
    vocabulary = learned['vocab'] | {name: len(learned['vocab']) + i for i, name in enumerate(CLIP_SPECIALS)}
    return import_transformers().CLIPTokenizer(
        vocab=vocabulary, merges=learned['merges'], pad_token=CLIP_SPECIALS[1], model_max_length=77
    )


def vocabulary_and_merges(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Return the vocabulary and the merges of a byte-pair encoding."""
    model = json.loads(backend.to_str())['model']
    vocabulary = dict(model['vocab'])
    for piece in pre_tokenizers.ByteLevel.alphabet():
        vocabulary.setdefault(piece + END_OF_WORD, len(vocabulary))
    return {'vocab': vocabulary, 'merges': [tuple(pair) for pair in model['merges']]}


def parts(t5_vocabulary: int, clip_vocabulary: int) -> dict[str, tuple[str, ComponentConfig]]:
    """Return folder -> released class and sizes of the text encoders."""
    tower: dict[str, Any] = {'vocab_size': clip_vocabulary, 'num_hidden_layers': 2, 'eos_token_id': clip_vocabulary - 1}
    clip_l = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, projection_dim=POOLED_WIDTH // 2, **tower
    )
    clip_g = CLIPTextConfig(
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=4,
        projection_dim=POOLED_WIDTH // 2,
        hidden_act='gelu',
        **tower,
    )
    return {
        folders.CLIP_L: ('CLIPTextModelWithProjection', clip_l),
        folders.CLIP_G: ('CLIPTextModelWithProjection', clip_g),
        folders.T5: (
            'T5EncoderWithProjection',
            T5Config(
                out_dim=STATES_WIDTH, vocab_size=t5_vocabulary, d_model=64, d_kv=8, d_ff=128, num_layers=4, num_heads=8
            ),
        ),
        TEACHER_ENCODER: (
            'T5EncoderModel',
            T5EncoderConfig(
                vocab_size=t5_vocabulary, d_model=STATES_WIDTH, d_kv=16, d_ff=256, num_layers=4, num_heads=8
            ),
        ),
    }


def write(out: pathlib.Path, seed: int = 0) -> None:
    """Write tokenizers and encoders into a folder; its other files are unchanged.

    A complete component is not written again, and an incomplete one never appears.
    """
    texts = [text for world in WORLDS.values() for text in captions(world)]
    t5, clip = t5_tokenizer(words(texts)), clip_tokenizer(texts)
    for name, tokenizer in {
        folders.CLIP_L_TOKENIZER: clip,
        folders.CLIP_G_TOKENIZER: clip,
        folders.T5_TOKENIZER: t5,
    }.items():
        if not (out / name).is_dir():
            with atomic_folder(out / name) as partial:
                tokenizer.save_pretrained(partial)
    for number, (name, (kind, config)) in enumerate(parts(len(t5), len(clip)).items()):
        if (out / name / 'config.json').is_file():
            continue
        params = random_params(kind, config, 1000 * seed + number)
        checkpoint.save(out / name, COMPONENTS[kind].build(config), _scaled_embeddings(params))


def _scaled_embeddings(params: dict[str, Any]) -> dict[str, Any]:
    """Return parameters whose embeddings have the deviation that other layers expect of their input."""
    return {
        name: _scaled_embeddings(value)
        if isinstance(value, dict)
        else value * (EMBEDDING_SCALE if 'embedding' in name else 1.0)
        for name, value in params.items()
    }
