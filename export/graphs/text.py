"""Text encoders as phone graphs.

Token tables stay on the host. A lookup reads 77 of 49,408 rows at negligible cost; in a graph it would need a gather on
integer ids and the whole table (76 and 126 MB in FP16). The host also computes the padding mask and the position of the
end-of-text token, which are float inputs. Every graph takes one prompt as tokens of rank 2, so that a linear layer over
rows is one operation.

Legend: L tokens, D width, N heads, O projected width. Source: arXiv 2511.06055, section 4.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from export.graphs.stored_params import read_float32
from export.graphs.table import Params, PhoneGraph
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.generation.tokens import CLIP_LENGTH
from neodragon_jax.models.clip import CLIPTextModel
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.t5 import T5EncoderWithProjection, key_bias

Path = str | os.PathLike[str]

# T5's residual stream peaks at five times the largest FP16 value. The scale is a power of two, so division is exact.
RESIDUAL_SCALE = 16.0
# Below this, |GELU(x)| is at most 6e-9 (zero in float32), and the HTP's narrow types compute it wrongly.
GELU_FLOOR = -6.0


def open_component(folder: Path, kind: type) -> Any:
    """Return the module of a component folder, computing in float32.

    Raises:
      InputError: the folder is missing or damaged, or holds another kind of module.
    """
    return checkpoint.load_module(folder, kind).clone(dtype=jnp.float32)


def clip_pooled(name: str, folder: Path) -> PhoneGraph:
    """Return the CLIP tower that computes the pooled vector: `embeddings` [L, D], `end` [1, L] -> `pooled` [1, O].

    `end` is 1 at the end-of-text token and 0 elsewhere: the product with it selects that row exactly in any type.
    """
    tower = open_component(folder, CLIPTextModel)

    def apply(params: Params, embeddings: Array, end: Array) -> Array:
        last = _run(tower, params, embeddings, method='transform')[-1]
        return _run(tower, params, last, end, method='pool')

    inputs = {'embeddings': (CLIP_LENGTH, tower.config.hidden_size), 'end': (1, CLIP_LENGTH)}
    return PhoneGraph(name, apply, inputs, ('pooled',), _tower_reader(folder), pathlib.Path(folder))


def clip_states(name: str, folder: Path, pooled: bool) -> PhoneGraph:
    """Return a CLIP tower of the first-frame model: `embeddings` [L, D] -> `states` [L, D] before the last layer.

    With `pooled` it also takes `end` and returns `pooled`, as in `clip_pooled`; otherwise it omits the last layer.
    """
    tower = open_component(folder, CLIPTextModel)

    def apply(params: Params, embeddings: Array, *end: Array) -> Any:
        states = _run(tower, params, embeddings, method='transform')
        return (states[-2], _run(tower, params, states[-1], *end, method='pool')) if pooled else states[-2]

    inputs = {'embeddings': (CLIP_LENGTH, tower.config.hidden_size)} | ({'end': (1, CLIP_LENGTH)} if pooled else {})
    more = ('pooled',) if pooled else ()
    return PhoneGraph(name, apply, inputs, ('states', *more), _tower_reader(folder), pathlib.Path(folder))


def dt5(folder: Path, text_tokens: int) -> PhoneGraph:
    """Return DT5: `embeddings` [L, D] divided by RESIDUAL_SCALE, `keys` [1, L] -> `states` [L, O].

    `keys` is added to the scores of each key, see `models.t5.key_bias`.

    Args:
      text_tokens: L.
    """
    model = open_component(folder, T5EncoderWithProjection)
    config = model.config
    epsilon = config.layer_norm_epsilon / RESIDUAL_SCALE**2
    scaled = model.clone(config=dataclasses.replace(config, layer_norm_epsilon=epsilon))

    def apply(params: Params, embeddings: Array, keys: Array) -> Array:
        params, positions = params['model'], params['positions']

        def encode(bound: T5EncoderWithProjection) -> Array:
            bias = positions + keys.reshape(1, 1, text_tokens)
            return bound.project(bound.encoder.transform(embeddings, bias))

        return _run(scaled, params, method=encode)

    def read() -> Params:
        params = read_float32(folder)
        positions = _run(model, params, method=lambda bound: bound.encoder.positions(text_tokens))
        params['encoder'] = scale_residual(params['encoder'])
        del params['encoder']['token_embedding'], params['encoder']['position_bias']
        return {'model': params, 'positions': np.asarray(positions)}

    inputs = {'embeddings': (text_tokens, config.d_model), 'keys': (1, text_tokens)}
    return PhoneGraph('dt5', apply, inputs, ('states',), read, pathlib.Path(folder))


def scale_residual(encoder: Params, scale: float = RESIDUAL_SCALE) -> dict[str, Any]:
    """Return parameters of a T5 encoder whose residual stream is 1 / scale of the original.

    The embeddings must be divided by `scale` and the epsilon of the norms by scale^2. Every norm then returns the same
    values as before, so the encoder computes the same function, and its intermediate values stay in the range of FP16.
    """
    scaled = dict(encoder)
    for name in encoder:
        if name.startswith('block_'):
            block = dict(encoder[name])
            out = {'kernel': block['attention']['out']['kernel'] / np.float32(scale)}
            block['attention'] = {**block['attention'], 'out': out}
            block['mlp_out'] = {'kernel': block['mlp_out']['kernel'] / np.float32(scale)}
            scaled[name] = block
    return scaled


def context_adapter(folder: Path, text_tokens: int) -> PhoneGraph:
    """Return the context adapter: `states` [L, O] -> `text` [L, D], for L = text_tokens."""
    model = open_component(folder, ContextAdapter)
    inputs = {'states': (text_tokens, model.config.input_dims)}
    read = partial(read_float32, folder)
    apply = partial(_run, model)
    return PhoneGraph('context_adapter', apply, inputs, ('text',), read, pathlib.Path(folder), gelu_floor=GELU_FLOOR)


@dataclasses.dataclass(frozen=True)
class ClipHost:
    """The host's half of a CLIP tower: tables of tokens and positions.

    Attributes:
      tower: the module.
      params: of the two tables.
    """

    tower: CLIPTextModel
    params: Params

    @classmethod
    def load(cls, folder: Path) -> ClipHost:
        """Read the tables of a tower."""
        params = read_float32(folder, 'token_embedding', 'position_embedding')
        return cls(open_component(folder, CLIPTextModel), params)

    def embeddings(self, ids: np.ndarray) -> Float[np.ndarray, 'L D']:
        """Return the embeddings of one prompt's ids [L]."""
        tokens, positions = (self.params[name]['embedding'] for name in ('token_embedding', 'position_embedding'))
        return tokens[ids] + positions[: len(ids)]

    def end(self, ids: np.ndarray) -> Float[np.ndarray, '1 L']:
        """Return 1 at the end-of-text token of one prompt's ids [L], else 0."""
        return np.eye(len(ids), dtype=np.float32)[int(self.tower.end_of_text(jnp.asarray(ids)))][None]


@dataclasses.dataclass(frozen=True)
class T5Host:
    """The host's half of DT5: its token table, divided by RESIDUAL_SCALE."""

    table: Float[np.ndarray, 'V D']

    @classmethod
    def load(cls, folder: Path) -> T5Host:
        """Read the table."""
        table = read_float32(folder, 'encoder')['encoder']['token_embedding']['embedding']
        return cls(table / np.float32(RESIDUAL_SCALE))

    def inputs(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Return the graph's inputs for one prompt's ids and mask [L]."""
        return {'embeddings': self.table[ids], 'keys': np.asarray(key_bias(jnp.asarray(mask)), np.float32)}


def _tower_reader(folder: Path) -> Callable[[], Params]:
    """Return a function that reads the parameters of a tower's graph: all except the embedding tables."""

    def read() -> Params:
        params = read_float32(folder)
        return {name: tree for name, tree in params.items() if not name.endswith('_embedding')}

    return read


def _run(model: Any, params: Params, *inputs: Array, method: Any = None) -> Any:
    return model.apply({'params': params}, *inputs, method=method)
