"""Text conditioning of the denoiser from prompts: tokenizers, embedding tables, four graphs.

Legend: L tokens, D width, P pooled width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ftfy
import numpy as np
import tokenizers

from neodragon_phone.bundle import Bundle
from neodragon_phone.errors import BundleError
from neodragon_phone.player import Player, Sessions


class Prompt(NamedTuple):
    """Text conditioning of the denoiser for one prompt."""

    text: np.ndarray  # [L, D], states after the context adapter
    mask: np.ndarray  # [L], 1 for tokens, 0 for padding
    pooled: np.ndarray  # [1, P], pooled vectors of the two CLIP towers


def encode_prompts(player: Player, prompts: list[str]) -> list[Prompt]:
    """Return the text conditioning of prompts, modifier included; a first prompt that is cut is reported."""
    entry = player.manifest['text']['dt5']
    if is_cut(player.bundle, entry, prompts[0]):
        player.report(f'The prompt has more than {entry["tokens"]} tokens and is cut. Shorten it.')
    with player.phase('text') as graphs:
        return [_encode_prompt(player.bundle, graphs, prompt) for prompt in prompts]


def _encode_prompt(bundle: Bundle, graphs: Sessions, prompt: str) -> Prompt:
    towers = ('clip_l', 'clip_g')
    pooled = [graphs[name](tower_inputs(bundle, bundle.manifest['text'][name], prompt))['pooled'] for name in towers]
    entry = bundle.manifest['text']['dt5']
    ids, mask = encode(bundle, entry, prompt)
    table = bundle.table(entry['token_table'])
    keys = np.where(mask == 1, np.float32(0), np.float32(entry['padded_key']))[None]
    states = graphs['dt5']({'embeddings': rows(table, ids), 'keys': keys})['states']
    text = graphs['context_adapter']({'states': states})['text']
    return Prompt(text, mask, np.concatenate(pooled, axis=-1))


def tower_inputs(bundle: Bundle, entry: Any, prompt: str) -> dict[str, np.ndarray]:
    """Return the inputs of a CLIP tower: the embeddings [L, D], and 1 at the end-of-text token [1, L]."""
    ids = tower_ids(bundle, entry, prompt)
    embeddings, positions = rows(bundle.table(entry['token_table']), ids), bundle.table(entry['position_table'])
    if embeddings.shape != positions.shape:
        raise BundleError(
            f'embeddings are {list(embeddings.shape)}, positions {list(positions.shape)}: different towers.'
        )
    rule = entry['end_of_text']
    at = np.argmax(ids) if rule['rule'] == 'first largest id' else np.argmax(ids == rule.get('id'))
    return {'embeddings': embeddings + positions, 'end': np.eye(len(ids), dtype=np.float32)[at][None]}


def tower_ids(bundle: Bundle, entry: Any, prompt: str) -> np.ndarray:
    """Return the ids [L] of a prompt for a CLIP tower: its training text had straight quotes and no mojibake."""
    return encode(bundle, entry, ftfy.fix_text(prompt))[0]


def encode(bundle: Bundle, entry: Any, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask of a prompt, padded or cut to the tower's length."""
    encoding = _encoding(bundle, entry, prompt)
    return np.asarray(encoding.ids, np.int64), np.asarray(encoding.attention_mask, np.int64)


def is_cut(bundle: Bundle, entry: Any, prompt: str) -> bool:
    """Return whether a prompt has more tokens than the tower takes."""
    return bool(_encoding(bundle, entry, prompt).overflowing)


def _encoding(bundle: Bundle, entry: Any, prompt: str) -> tokenizers.Encoding:
    path = bundle.path(entry['tokenizer'])
    try:
        encoding = tokenizers.Tokenizer.from_file(str(path)).encode(prompt)
    except Exception as error:  # the library raises bare Exception
        raise BundleError(
            f'{entry["tokenizer"]}: not a tokenizer ({str(error)[:80]}). Copy the bundle again.'
        ) from None
    if len(encoding.ids) != entry['tokens']:
        raise BundleError(f'{entry["tokenizer"]}: gives {len(encoding.ids)} tokens, not {entry["tokens"]}.')
    return encoding


def rows(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return rows of a table, of which only those are read.

    Raises:
      BundleError: an id is beyond the table.
    """
    if table.ndim != 2 or not (ids.min() >= 0 and ids.max() < len(table)):
        raise BundleError(f'an embedding table of shape {list(table.shape)} has no row {ids.max()}.')
    return np.asarray(table[ids])
