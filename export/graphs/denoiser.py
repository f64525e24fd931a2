"""The denoiser as graphs: one per stage, and one for the modulation of all stages.

A stage's graph is a chain of pieces that run in sequence: patch embedding, blocks, and the last block with the head. A
model of 18 blocks is thus exported and quantized one block at a time (see stitch.py). Values that depend only on the
prompt, the timestep or the position in the video are inputs: the modulation comes from a separate graph, and the rotary
embedding and the attention bias come from the host. The graphs therefore hold no index arithmetic, and padding frames
are masked exactly.

Legend: B batch, C channels, h w a stage's latent grid, L text tokens, I image tokens, S = L + I, D width, K head dim,
P values per patch, X current image tokens, t width of the timestep's sinusoid, p width of the pooled prompt.
Source: arXiv 2511.06055, section 4 and table 9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from export.graphs.modulation import modulation_graph, named, unroll, vector_shapes
from export.graphs.stored_params import read_part, to_float32
from export.graphs.table import Params, PhoneGraph
from neodragon_jax.models.joint_block import JointBlock
from neodragon_jax.models.mmdit import PyramidMMDiT, rotary_and_bias
from neodragon_jax.pyramid.history import envelope
from neodragon_jax.pyramid.layout import Layout, position_ids


@dataclasses.dataclass(frozen=True)
class Form:
    """Variant of the stages' graphs; all variants compute the same function.

    Attributes:
      attention: strategy, see models/attention.py.
      rotary: form of the rotary embedding, see `rotary.make_rotary`.
      modulation_inside: whether each stage's graph computes its own modulation.
      supports_frame_zero: whether the graphs also support unit 0, the only unit whose text attends to the current unit.
      fused: whether the rewrites of rewrite/for_htp.py are applied to quantized graphs.
    """

    attention: str = 'prefix_folded'
    rotary: str = 'matrices'
    modulation_inside: bool = False
    supports_frame_zero: bool = True
    fused: bool = True


SHIPPED = Form()
# In order, from a direct export of the trained model to the form with the least work.
FORMS = {
    'straightforward': Form('masked', 'halves', modulation_inside=True, fused=False),
    'masked': Form('masked', 'halves'),
    'prefix': Form('prefix', 'halves'),
    'prefix_folded': Form('prefix_folded', 'halves'),
    'prefix_folded_matrices': SHIPPED,
}


def denoiser_graphs(
    model: PyramidMMDiT,
    params: Params,
    units: int,
    grid: tuple[int, int],
    text_tokens: int,
    stages: int,
    form: Form = SHIPPED,
) -> list[PhoneGraph]:
    """Return one graph per stage: `denoise` at the shape of the last unit, whose history holds all earlier units.

    Inputs: `patches` [I, P] of all clips, oldest first, padding included; `text` [L, D]; rotary embedding and attention
    bias by their path in Condition, such as `bias.key`; modulation likewise, such as `blocks.3.image.gate_mlp` [D], or
    with the modulation inside `timestep` [1, t] and `pooled` [1, p]. Output: `flow` [X, P].

    Args:
      model: denoiser in any form; exported unrolled, in float32.
      params: unrolled; read when a graph is exported, a block at a time.
      units: history frames.
      grid: patches (rows, columns) of a full-size latent frame.
    """
    model = for_export(model, form)
    inside = (modulation_graph(model, params),) if form.modulation_inside else ()
    graphs = []
    for stage in range(stages):
        layout = envelope(stage, units, stages, grid, text_tokens)
        layout = dataclasses.replace(layout, text_sees_current=form.supports_frame_zero)
        name = f'denoiser_stage{stage}'
        graphs.append(_chain(name, (*inside, *_pieces(name, model, params, layout)), form.fused))
    return graphs


@partial(jax.jit, static_argnums=(0, 1))
def placement(model: PyramidMMDiT, layout: Layout, frame_ids: Array, text_mask: Array) -> dict[str, Any]:
    """Return rotary embedding and attention bias, which depend only on the position in the video and the text mask."""
    rotary, bias = rotary_and_bias(model, layout, position_ids(layout, frame_ids), text_mask)
    return {'rotary': rotary, 'bias': bias}


def _chain(name: str, pieces: tuple[PhoneGraph, ...], fused: bool) -> PhoneGraph:
    """Return the graph that calls the pieces of a stage in sequence."""
    inputs: dict[str, tuple[int, ...]] = {}
    made: set[str] = set()
    for piece in pieces:
        inputs |= {key: shape for key, shape in piece.inputs.items() if key not in made}
        made.update(piece.outputs)

    def whole(_: Params, *arrays: Array) -> Array:
        values = dict(zip(inputs, arrays, strict=True))
        for piece in pieces:
            outputs = piece.close()(*(values[key] for key in piece.inputs))
            values |= zip(piece.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)
        return values['flow']

    return PhoneGraph(name, whole, inputs, ('flow',), pieces=pieces, fused=fused)


def _pieces(name: str, model: PyramidMMDiT, params: Params, layout: Layout) -> Iterator[PhoneGraph]:
    """Yield patch embedding, every block, and the last block with the head."""
    examples = jnp.zeros((1, len(layout.grids)), jnp.int32), jnp.zeros((1, layout.text_tokens), jnp.int32)
    place = jax.eval_shape(partial(placement, model, layout), *examples)
    vectors = vector_shapes(model)
    yield _embedding(name, model, params, layout)
    for index in range(model.config.num_layers - 1):
        yield _block(name, model, params, layout, index, {f'blocks.{index}': vectors.blocks[index], **place})
    yield _last_block(name, model, params, layout, {'head': vectors.head, 'last_block': vectors.last_block, **place})


def _embedding(name: str, model: PyramidMMDiT, params: Params, layout: Layout) -> PhoneGraph:
    """Return the patch embedding: `patches` [I, P] -> `image.0` [I, D].

    Its weights are less than a thousandth of the model's, and their rounding error is the same in all calls of a video:
    they are stored in two parts.
    """
    positions = np.asarray(model.apply({'params': read_part(params)}, layout, method='position_rows'))

    def embed(_: Params, patches: Array) -> Array:
        own = read_part(params, 'patch_embed')
        return model.apply({'params': own}, patches, jnp.asarray(positions), method='embed')  # pyright: ignore[reportReturnType]

    inputs = {'patches': (layout.image_tokens, model.config.patch_dim)}
    return PhoneGraph(f'{name}.embed', embed, inputs, ('image.0',), in_two_parts=True)


def _block(name: str, model: PyramidMMDiT, params: Params, layout: Layout, index: int, tree: Any) -> PhoneGraph:
    """Return a block before the last: `image.N`, `text.N` -> `image.N+1`, `text.N+1`.

    Args:
      tree: shapes of modulation, rotary embedding and bias; its leaves are the other inputs.
    """
    block = JointBlock(model.config, model.dtype, attention=model.attention)

    def run(_: Params, image: Array, text: Array, *leaves: Array) -> tuple[Array, Array]:
        given = _unflatten(tree, leaves)
        args = (image, text), given[f'blocks.{index}'], given['rotary'], given['bias'], layout.image_tokens
        streams: Any = block.apply({'params': to_float32(params[f'blocks_{index}'])}, *args)
        return streams[0]

    following = f'image.{index + 1}', f'text.{index + 1}'
    return PhoneGraph(f'{name}.block{index}', run, _streams(model, layout, index) | _shapes(tree), following)


def _last_block(name: str, model: PyramidMMDiT, params: Params, layout: Layout, tree: Any) -> PhoneGraph:
    """Return the last block with the head: image and text -> `flow` [X, P]; `tree` as of `_block`."""

    def finish(_: Params, image: Array, text: Array, *leaves: Array) -> Array:
        given = _unflatten(tree, leaves)
        args = *(given[key] for key in ('last_block', 'head', 'rotary', 'bias')), layout.current_tokens
        own = read_part(params, 'last_block', 'head')
        return model.apply({'params': own}, (image, text), *args, method='finish')  # pyright: ignore

    inputs = _streams(model, layout, model.config.num_layers - 1) | _shapes(tree)
    return PhoneGraph(f'{name}.finish', finish, inputs, ('flow',))


def _streams(model: PyramidMMDiT, layout: Layout, index: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the image and text tokens that enter a block."""
    width = model.config.width
    return {
        f'image.{index}': (layout.image_tokens, width),
        f'text.{index}' if index else 'text': (layout.text_tokens, width),
    }


def _unflatten(tree: dict[str, Any], leaves: Sequence[Array]) -> dict[str, Any]:
    """Return the tree with other leaves."""
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every leaf as a graph input; a modulation vector becomes one-dimensional."""
    return {name: leaf.shape[-1:] if leaf.ndim == 3 else leaf.shape for name, leaf in named(tree).items()}


def for_export(model: PyramidMMDiT, form: Form) -> PyramidMMDiT:
    """Return the denoiser unrolled, in the given form, computing in float32."""
    return unroll(model).clone(attention=form.attention, rotary=form.rotary)
