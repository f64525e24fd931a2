"""Text conditioning stored with each prompt of a sample set, so that training runs fewer text encoders or none.

    states  text [L, D]: after the context adapter, as the denoiser reads it; text_mask [L], pooled [P]
    t5      t5 [L, W]: states before the context adapter, for training it; text_mask [L], pooled [P]
    ids     ids [L], text_mask [L], clip_l_ids [77], clip_g_ids [77]: tokens, for training the text encoder

Legend: B prompts, L T5 tokens (128), W width of the T5 states, D the denoiser's width, P pooled width.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neodragon_jax.base.paths import input_path
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders as component_folders
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.checkpoint.params import read_params
from neodragon_jax.generation.devices import Spread
from neodragon_jax.generation.tokens import T5Tokenizer, Tokenizers, Tokens
from neodragon_jax.models.clip import CLIPTextModel
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.t5 import T5Encoder, T5EncoderWithProjection
from train.data.record_spec import ArraySpec

CONTENTS = ('states', 't5', 'ids')
# Module classes of each part.
KINDS = {
    't5': (T5Encoder, T5EncoderWithProjection),
    'clip_l': (CLIPTextModel,),
    'clip_g': (CLIPTextModel,),
    'adapter': (ContextAdapter,),
}
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Conditioner:
    """Function from prompts to arrays with a leading batch axis.

    Attributes:
      content: one of CONTENTS.
      tokenizer: of T5, whose length limits the prompts.
      fingerprints: of the components in use, by name.
      batch: largest number of prompts per call; None for any number.
    """

    content: str
    tokenizer: T5Tokenizer
    fingerprints: dict[str, str]
    batch: int | None
    encode: Callable[[Sequence[str]], Arrays]

    def __call__(self, prompts: Sequence[str]) -> Arrays:
        """Return the arrays of some prompts, modifier included, at most `batch`."""
        if self.batch is None:
            return self.encode(prompts)
        padded = [*prompts, *[prompts[-1]] * (self.batch - len(prompts))]
        return {name: array[: len(prompts)] for name, array in self.encode(padded).items()}

    def one(self, prompt: str) -> Arrays:
        """Return the arrays of one prompt, without a batch axis."""
        return {name: array[0] for name, array in self([prompt]).items()}

    def specs(self, dtype: str) -> dict[str, ArraySpec]:
        """Return the specs of the stored arrays.

        Args:
          dtype: type of the floating-point arrays.
        """
        return {
            name: ArraySpec(array.shape, str(array.dtype) if array.dtype.kind == 'i' else dtype)
            for name, array in self.one('').items()
        }


def token_ids(tokenizers: Tokenizers, prompts: Sequence[str]) -> Arrays:
    """Return the tokens of prompts as a sample set stores them."""
    tokens = tokenizers(prompts)
    return {
        'ids': tokens.t5_ids,
        'text_mask': tokens.t5_mask,
        'clip_l_ids': tokens.clip_l_ids,
        'clip_g_ids': tokens.clip_g_ids,
    }


def load_conditioner(
    root: str | os.PathLike[str],
    content: str,
    *,
    mode: str = 'monolithic',
    text_encoder: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    spread: Spread | None = None,
    batch: int = 1,
) -> Conditioner:
    """Load the components that a content needs.

    Args:
      mode: of the context adapter that makes the states.
      text_encoder: folder of a T5 encoder instead of the checkpoint's, such as the teacher's; for 't5' only.
      dtype: compute type; results are float32 before they are stored.
      spread: devices.
      batch: prompts per device and call.
    Raises:
      InputError: a component is missing, damaged, or of another kind.
    """
    tokenizers = Tokenizers.load(root)
    if content == 'ids':
        return Conditioner(content, tokenizers.t5, {}, None, lambda prompts: token_ids(tokenizers, prompts))
    spread = spread or Spread(jax.local_devices())
    find = lambda name: checkpoint.component_folder(root, name)
    folders: dict[str, pathlib.Path] = {
        't5': input_path(text_encoder, '--text-encoder') if text_encoder else find(component_folders.T5),
        'clip_l': find(component_folders.CLIP_L),
        'clip_g': find(component_folders.CLIP_G),
    }
    if content == 'states':
        folders['adapter'] = find(component_folders.ADAPTER_FOLDERS[mode])
    modules = {
        name: checkpoint.load_module(folder, *KINDS[name]).clone(dtype=dtype) for name, folder in folders.items()
    }
    params = {name: spread.replicate(read_params(folder, dtype)) for name, folder in folders.items()}
    run = jax.jit(lambda params, tokens: _condition(modules, params, tokens))

    def encode(prompts: Sequence[str]) -> Arrays:
        return jax.device_get(run(params, spread.shard(tokenizers(prompts))))

    fingerprints = {name: fingerprint(folder) for name, folder in folders.items()}
    return Conditioner(content, tokenizers.t5, fingerprints, batch * len(spread.devices), encode)


def _condition(modules: Mapping[str, Any], params: Mapping[str, Any], tokens: Tokens) -> dict[str, Any]:
    """Return the conditioning of some prompts."""
    run = lambda name, *args: modules[name].apply({'params': params[name]}, *args)
    states = run('t5', tokens.t5_ids, tokens.t5_mask)
    text = {'text': run('adapter', states)} if 'adapter' in modules else {'t5': states}
    pooled = [run('clip_l', tokens.clip_l_ids).pooled, run('clip_g', tokens.clip_g_ids).pooled]
    arrays = text | {'pooled': jnp.concatenate(pooled, axis=-1)}
    return {name: array.astype(jnp.float32) for name, array in arrays.items()} | {'text_mask': tokens.t5_mask}
