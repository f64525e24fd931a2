"""Tokenization of prompts with the three tokenizers of a released checkpoint.

Legend: B prompts, L tokens of T5: 128, or fewer if the checkpoint's tokenizer is configured so.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Int32
from pydantic import Field

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import is_there
from neodragon_jax.base.json_file import checked, read_json
from neodragon_jax.checkpoint import folders, shipped
from neodragon_jax.generation.defaults import RELEASED

# Of the released system; a checkpoint may override it, see `generation`.
DEFAULT_MODIFIER = RELEASED.prompt_modifier
DEFAULT_NEGATIVE_PROMPT = RELEASED.negative_prompt
T5_LENGTH = 128
CLIP_LENGTH = 77


class Tokens(NamedTuple):
    """Token ids of B prompts for the three text encoders, padded or cut to each encoder's length."""

    clip_l_ids: Int32[np.ndarray, 'B 77']
    clip_g_ids: Int32[np.ndarray, 'B 77']
    t5_ids: Int32[np.ndarray, 'B L']
    t5_mask: Int32[np.ndarray, 'B L']  # 1 for tokens, 0 for padding


@dataclasses.dataclass(frozen=True)
class ClipTokenizer:
    """Byte-pair encoding of a CLIP tower; it returns ids only, because the tower takes no mask."""

    backend: Any  # a transformers tokenizer

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ClipTokenizer:
        """Load from a tokenizer folder of the checkpoint.

        Raises:
          InputError: a file is missing, empty or unreadable.
        """
        return cls(_load_backend(pathlib.Path(folder), 'CLIPTokenizer', ('vocab.json', 'merges.txt')))

    def __call__(self, prompts: Sequence[str]) -> Int32[np.ndarray, 'B 77']:
        """Return ids, padded with the pad token of this tokenizer's config."""
        import ftfy

        # CLIP was trained on repaired text (straight quotes, no mojibake); the current backend omits that step.
        repaired = [ftfy.fix_text(prompt) for prompt in _checked(prompts)]
        return _encode(self.backend, repaired, CLIP_LENGTH)[0]


@dataclasses.dataclass(frozen=True)
class T5Tokenizer:
    """Sentencepiece encoding of the T5 encoder."""

    backend: Any  # a transformers tokenizer

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> T5Tokenizer:
        """Load from a tokenizer folder of the checkpoint.

        Raises:
          InputError: a file is missing, empty or unreadable.
        """
        return cls(_load_backend(pathlib.Path(folder), 'T5Tokenizer', ('spiece.model',)))

    def __call__(self, prompts: Sequence[str]) -> tuple[Int32[np.ndarray, 'B L'], Int32[np.ndarray, 'B L']]:
        """Return ids and their mask."""
        return _encode(self.backend, _checked(prompts), self.length)

    @property
    def length(self) -> int:
        """L: the released 128, or the tokenizer's own `model_max_length` if that is less."""
        return min(T5_LENGTH, self.backend.model_max_length)


@dataclasses.dataclass(frozen=True)
class Tokenizers:
    """The three tokenizers of the text encoders that condition the denoiser."""

    clip_l: ClipTokenizer
    clip_g: ClipTokenizer
    t5: T5Tokenizer

    @classmethod
    def load(cls, root: str | os.PathLike[str]) -> Tokenizers:
        """Load `tokenizer`, `tokenizer_2` and `tokenizer_3` from a checkpoint's root folder.

        Raises:
          InputError: a folder or a file in it is missing, empty or unreadable.
        """
        root = shipped.find(root, folders.TOKENIZERS, 'checkpoint')
        return cls(
            clip_l=ClipTokenizer.load(root / folders.CLIP_L_TOKENIZER),
            clip_g=ClipTokenizer.load(root / folders.CLIP_G_TOKENIZER),
            t5=T5Tokenizer.load(root / folders.T5_TOKENIZER),
        )

    def __call__(self, prompts: Sequence[str], modifier: str = '') -> Tokens:
        """Return the tokens of each prompt followed by `modifier`, cut at the length of each encoder.

        Raises:
          InputError: prompts is not a list of at least one text.
        """
        texts = [prompt + modifier for prompt in _checked(prompts)]
        return Tokens(self.clip_l(texts), self.clip_g(texts), *self.t5(texts))


def cut_prompts(tokenizer: T5Tokenizer, prompts: Sequence[str], modifier: str = '') -> list[str]:
    """Return the prompts that, with the modifier, are too long for T5 and are therefore cut."""
    ids = tokenizer.backend([prompt + modifier for prompt in _checked(prompts)])['input_ids']
    return [prompt for prompt, row in zip(prompts, ids, strict=True) if len(row) > tokenizer.length]


def cut_notice(tokenizer: T5Tokenizer, prompts: Sequence[str], modifier: str = '') -> str:
    """Return a line on the prompts that exceed T5's limit, with their number and an example; '' if there are none."""
    cut = cut_prompts(tokenizer, prompts, modifier)
    if not cut:
        return ''
    return (
        f'{len(cut)} of {len(prompts)} prompts have more than {tokenizer.length} tokens and are cut, such as '
        f'"{cut[0][:60]}". Shorten them.'
    )


def _checked(prompts: Sequence[str]) -> list[str]:
    """Return the prompts as a list, or raise InputError."""
    # A single string is also a sequence of strings, one per character.
    if isinstance(prompts, str):
        raise InputError('prompts is one text; give a list of texts, here [prompt].')
    texts = list(prompts)
    if not texts:
        raise InputError('prompts is empty; give at least one text, which may be "".')
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f'prompts[{i}] is of type {type(text).__name__}; give a text.')
    return texts


def _encode(backend: Any, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask [B, length]."""
    encoded = backend(texts, padding='max_length', truncation=True, max_length=length, return_attention_mask=True)
    return np.asarray(encoded['input_ids'], np.int32), np.asarray(encoded['attention_mask'], np.int32)


_REMEDY = 'Copy the folder from the release again, or correct the path.'


def _checked_files(folder: pathlib.Path, vocabulary: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the files of a tokenizer.

    Raises:
      InputError: one is missing or empty.
    """
    if not (is_there(folder) and folder.is_dir()):
        raise InputError(f'{folder}: no such tokenizer folder. {_REMEDY}')
    if is_there(folder / 'tokenizer.json'):
        vocabulary = ('tokenizer.json',)
    # Without its config, a tokenizer silently pads with the wrong token.
    names = ('tokenizer_config.json', *vocabulary)
    for path in (folder / name for name in names):
        if not (is_there(path) and path.is_file()):
            raise InputError(f'{path}: the file is missing. {_REMEDY}')
        if path.stat().st_size == 0:
            raise InputError(f'{path}: the file is empty. {_REMEDY}')
    return names


def import_transformers() -> Any:
    """Return the package transformers, imported late and without its advice to install PyTorch."""
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
    import transformers

    return transformers


def _load_backend(folder: pathlib.Path, class_name: str, vocabulary: tuple[str, ...]) -> Any:
    """Load a transformers tokenizer after checking its files: transformers itself accepts an empty folder."""
    names = _checked_files(folder, vocabulary)
    transformers = import_transformers()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        read_json(folder / 'tokenizer_config.json', dict[str, Any])
        backend = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
        # Config values of the wrong type fail only when the tokenizer is used.
        checked(backend.model_max_length, Annotated[int, Field(ge=2)], str(folder), 'model_max_length')
        _encode(backend, ['a', ''], 2)
    except InputError as error:
        raise InputError(f'{folder}: {", ".join(names)} cannot be read as a tokenizer. {error}') from None
    except Exception as error:  # The backend raises bare Exception for unreadable files.
        raise InputError(f'{folder}: {", ".join(names)} cannot be read as a tokenizer. {_REMEDY}') from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    _check_ids(folder, max(backend.get_vocab().values()))
    return backend


def _check_ids(folder: pathlib.Path, largest: int) -> None:
    """Raise InputError if the text encoder beside a tokenizer has no embedding for its largest id."""
    encoder = folder.with_name(folders.ENCODER_FOLDERS.get(folder.name, folder.name))
    config = encoder / 'config.json'
    # Some programs copy or download tokenizers alone.
    if encoder == folder or not is_there(config):
        return
    # Without the models, which take seconds to import.
    size = read_json(config, dict[str, Any]).get('vocab_size')
    if isinstance(size, int) and largest >= size:
        raise InputError(
            f'{folder}: has tokens up to number {largest}, but {encoder.name} only {size} embeddings. They belong to '
            'different models; copy both folders again.'
        )
