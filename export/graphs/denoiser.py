"""The denoiser as graphs: one per stage, one for the modulation of all of them, and the host's half of a call.

A stage's graph is a chain of pieces, patch embedding, blocks, last block with head, so that a model of 18 blocks is
exported and quantized one block at a time (see stitch.py); the graph is the pieces called one after the other. What
depends on the prompt, the timestep or the place in the video only comes in: modulation from a graph of its own, once
per stage; rotary embedding and attention bias from the host. The graphs then hold no index arithmetic, and padding
frames are masked exactly.

Legend: B batch, C channels, h w a stage's latent grid, L text tokens, I image tokens, S = L + I, D width, K head dim,
P numbers in a patch, X current image tokens, t width of the timestep's sinusoid, p width of the pooled prompt.
Source: arXiv 2511.06055, section 4 and table 9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from export.graphs.table import FORBIDDEN, Feeds, Graph, Params
from neodragon_jax.base.errors import InputError
from neodragon_jax.models.attention import make_rotary, strategy
from neodragon_jax.models.layers import timestep_sinusoid
from neodragon_jax.models.mmdit import TIMESTEP_WIDTH, JointBlock, PyramidMMDiT
from neodragon_jax.models.modulation import BlockModulator
from neodragon_jax.pyramid.layout import Layout, layout_of, patchify, position_ids
from neodragon_jax.pyramid.sampler import Prompt, Unit
from neodragon_jax.pyramid.stages import envelope, envelope_frame_ids

MODULATION = 'denoiser_modulation'
# Modulations that a host remembers: a video needs one per stage and step.
_REMEMBERED = 32


@dataclasses.dataclass(frozen=True)
class Form:
    """How the stages are written; all forms are the same function.

    Attributes:
      attention: strategy, see models/attention.py.
      rotary: form of the rotary embedding, see `attention.make_rotary`.
      modulation_inside: whether the stage's graph computes its modulation itself.
      draws_frame_zero: whether the graphs serve unit 0 too, the only one whose text attends to the current unit.
      fused: whether quantized graphs are rewritten as quantized_rewrites.py says.
    """

    attention: str = 'prefix_folded'
    rotary: str = 'matrices'
    modulation_inside: bool = False
    draws_frame_zero: bool = True
    fused: bool = True


SHIPPED = Form()
# From what an exporter makes of the model as it is trained, to the least work.
FORMS = {
    'straightforward': Form('masked', 'halves', modulation_inside=True, fused=False),
    'masked': Form('masked', 'halves'),
    'prefix': Form('prefix', 'halves'),
    'prefix_folded': Form('prefix_folded', 'halves'),
    'prefix_folded_matrices': SHIPPED,
}


@dataclasses.dataclass(frozen=True)
class ChainedGraph(Graph):
    """A graph that is a chain of pieces: a piece reads graph inputs, and outputs of earlier pieces, by name.

    Attributes:
      fused: see Form.
    """

    pieces: tuple[Graph, ...] = ()
    fused: bool = True


def denoiser_graphs(
    model: PyramidMMDiT,
    params: Params,
    units: int,
    grid: tuple[int, int],
    text_tokens: int,
    stages: int,
    form: Form = SHIPPED,
) -> list[ChainedGraph]:
    """Return one graph per stage: `denoise` at the shape of the last unit, which holds all earlier units too.

    Inputs: `patches` [I, P] of all clips, oldest first, padding included; `text` [L, D]; rotary embedding and attention
    bias by their path in Condition, such as `bias.key`; modulation likewise, such as `blocks.3.image.gate_mlp` [D], or
    with the modulation inside `timestep` [1, t] and `pooled` [1, p]. Output: `flow` [X, P].

    Args:
      model: of any form; exported unrolled, in float32.
      params: unrolled; read when a graph is exported, a block at a time.
      units: history frames.
      grid: patches (rows, columns) of a full-size latent frame.
    """
    model = _for_export(model, form)
    inside = (modulation_graph(model, params),) if form.modulation_inside else ()
    graphs = []
    for stage in range(stages):
        layout = envelope(stage, units, stages, grid, text_tokens)
        layout = dataclasses.replace(layout, text_sees_current=form.draws_frame_zero)
        name = f'denoiser_stage{stage}'
        graphs.append(_chain(name, (*inside, *_pieces(name, model, params, layout)), form.fused))
    return graphs


def modulation_graph(model: PyramidMMDiT, params: Params) -> Graph:
    """Return the graph of all AdaLN vectors of all blocks, a third of the parameters, run once per stage.

    Inputs: `timestep` [1, t], the timestep's sinusoid; `pooled` [1, p]. Outputs: the vectors [D], named as the stages'
    graphs take them.
    """
    model = _for_export(model, SHIPPED)

    def modulate(sinusoid: Array, pooled: Array) -> tuple[Array, ...]:
        vectors = _modulate(model, _part(params, *_MODULATORS), sinusoid, pooled)
        return tuple(leaf.reshape(-1) for leaf in _named_vectors(vectors).values())

    inputs = {'timestep': (1, TIMESTEP_WIDTH), 'pooled': (1, model.config.pooled_projection_dim)}
    first, *rest = _named_vectors(_vector_shapes(model))
    return Graph(MODULATION, modulate, inputs, first, tuple(rest), judged_by_all=True)


class Vectors(NamedTuple):
    """All AdaLN vectors, each [1, 1, D]; the fields of Condition that depend on the timestep."""

    blocks: Any
    last_block: Any
    head: Any


_EMBEDDERS, _ENDS = ('time_embed', 'pooled_embed'), ('last_modulator', 'head_modulator')
_MODULATORS = (*_EMBEDDERS, 'modulators_', *_ENDS)


def _part(params: Params, *prefixes: str) -> dict[str, Any]:
    """Read the parameters whose names start so, and the positions, which every call of the module looks for."""
    prefixes = (*prefixes, 'positions')
    return {name: _on_host(params[name]) for name in params if name.startswith(prefixes)}


def _modulate(model: PyramidMMDiT, params: Params, sinusoid: Array, pooled: Array) -> Vectors:
    vectors: Any = model.apply({'params': params}, sinusoid, pooled, method='modulate')
    return Vectors(*vectors)


@partial(jax.jit, static_argnums=0)
def _embed_conditioning(model: PyramidMMDiT, params: Params, sinusoid: Array, pooled: Array) -> Any:
    return model.apply({'params': params}, sinusoid, pooled, method='embed_conditioning')


@jax.jit
def _modulate_block(params: Params, embedding: Array) -> Any:
    return BlockModulator().apply({'params': params}, embedding)


@partial(jax.jit, static_argnums=0)
def _modulate_end(model: PyramidMMDiT, params: Params, embedding: Array) -> Any:
    return model.apply({'params': params}, embedding, method='modulate_end')


def _vector_shapes(model: PyramidMMDiT) -> Vectors:
    args = jnp.zeros((1, TIMESTEP_WIDTH)), jnp.zeros((1, model.config.pooled_projection_dim))
    made = jax.eval_shape(partial(model.init, method='modulate'), jax.random.key(0), *args)
    return jax.eval_shape(partial(_modulate, model), made['params'], *args)


@partial(jax.jit, static_argnums=(0, 1))
def _place(model: PyramidMMDiT, layout: Layout, frame_ids: Array, text_mask: Array) -> dict[str, Any]:
    """Return what depends on the place in the video only: rotary embedding and attention bias."""
    config, ids = model.config, position_ids(layout, frame_ids)
    return {
        'rotary': make_rotary(model.rotary, layout, ids, config.max_num_frames, config.attention_head_dim),
        'bias': strategy(model.attention).bias(layout, ids, text_mask, config.num_attention_heads),
    }


def _chain(name: str, pieces: tuple[Graph, ...], fused: bool) -> ChainedGraph:
    """Return the graph that calls the pieces of a stage one after the other."""
    inputs: dict[str, tuple[int, ...]] = {}
    made: set[str] = set()
    for piece in pieces:
        inputs |= {key: shape for key, shape in piece.inputs.items() if key not in made}
        made.update(piece.outputs)

    def whole(*arrays: Array) -> Array:
        values = dict(zip(inputs, arrays, strict=True))
        for piece in pieces:
            outputs = piece.function(*(values[key] for key in piece.inputs))
            values |= zip(piece.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)
        return values['flow']

    return ChainedGraph(name, whole, inputs, 'flow', pieces=pieces, fused=fused)


def _pieces(name: str, model: PyramidMMDiT, params: Params, layout: Layout) -> Iterator[Graph]:
    """Yield patch embedding, every block, and the last block with the head."""
    config = model.config
    examples = jnp.zeros((1, len(layout.grids)), jnp.int32), jnp.zeros((1, layout.text_tokens), jnp.int32)
    place = jax.eval_shape(partial(_place, model, layout), *examples)
    vectors = _vector_shapes(model)
    positions = np.asarray(model.apply({'params': _part(params)}, layout, method='position_rows'))
    image, text = (layout.image_tokens, config.width), (layout.text_tokens, config.width)

    def embed(patches: Array) -> Array:
        own = _part(params, 'patch_embed')
        return model.apply({'params': own}, patches, jnp.asarray(positions), method='embed')  # pyright: ignore[reportReturnType]

    yield Graph(f'{name}.embed', embed, {'patches': (layout.image_tokens, config.patch_dim)}, 'image.0')
    words = 'text'
    for index in range(config.num_layers - 1):
        block = JointBlock(config, model.dtype, attention=model.attention)
        tree = {f'blocks.{index}': vectors.blocks[index], **place}

        def run(
            image: Array, text: Array, *leaves: Array, block: JointBlock = block, tree: Any = tree, index: int = index
        ) -> tuple[Array, Array]:
            given = _unflatten(tree, leaves)
            args = (image, text), given[f'blocks.{index}'], given['rotary'], given['bias'], layout.image_tokens
            streams: Any = block.apply({'params': _on_host(params[f'blocks_{index}'])}, *args)
            return streams[0]

        inputs = {f'image.{index}': image, words: text, **_shapes(tree)}
        words = f'text.{index + 1}'
        yield Graph(f'{name}.block{index}', run, inputs, f'image.{index + 1}', (words,))

    tree = {'head': vectors.head, 'last_block': vectors.last_block, **place}

    def finish(image: Array, text: Array, *leaves: Array) -> Array:
        given = _unflatten(tree, leaves)
        args = *(given[key] for key in ('last_block', 'head', 'rotary', 'bias')), layout.current_tokens
        own = _part(params, 'last_block', 'head')
        return model.apply({'params': own}, (image, text), *args, method='finish')  # pyright: ignore

    inputs = {f'image.{config.num_layers - 1}': image, words: text, **_shapes(tree)}
    yield Graph(f'{name}.finish', finish, inputs, 'flow')


def _unflatten(tree: dict[str, Any], leaves: Sequence[Array]) -> dict[str, Any]:
    """Return the tree with other leaves."""
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _named(tree: Any) -> dict[str, Any]:
    """Return the leaves by their path, such as `blocks.3.image.gate_mlp`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}


def _named_vectors(vectors: Vectors) -> dict[str, Any]:
    return _named(vectors._asdict())


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every leaf as a graph takes it: of a modulation vector, its width."""
    return {name: leaf.shape[-1:] if leaf.ndim == 3 else leaf.shape for name, leaf in _named(tree).items()}


class DenoiserHost:
    """The host's half of a denoiser call.

    Attributes:
      patch: side of a patch, in latent pixels.
    """

    def __init__(
        self,
        model: PyramidMMDiT,
        params: Params,
        form: Form = SHIPPED,
        modulate: Callable[[Feeds], Mapping[str, np.ndarray]] | None = None,
    ) -> None:
        """Prepare.

        Args:
          params: unrolled; those of the modulation are read whenever one is computed here, a block at a time, and
            not kept: they have 2 GB at full size, and a video needs few modulations.
          form: that of the graphs.
          modulate: runs the modulation graph; None computes the same in JAX.
        """
        self.patch = model.config.patch_size
        self._form, self._model, self._params = form, _for_export(model, form), params
        self._vectors: dict[bytes, Feeds] = {}
        self._modulate = modulate or self._modulate_here

    def patches(self, clip: Unit) -> Float[np.ndarray, 'i P']:
        """Return a clip of one example cut into patches, as graphs take and return it."""
        return np.asarray(patchify(jnp.asarray(clip, jnp.float32), self.patch))[0]

    def stage_inputs(
        self,
        history: Sequence[Unit],
        x: Unit,
        unit: Int[Array, ' 1'],
        prompt: Prompt,
        timestep: Float[Array, ' 1'],
    ) -> Feeds:
        """Return all inputs of a stage's graph for one example; the arguments are those of `sampler.Denoiser`.

        Raises:
          InputError: the unit is frame 0 and the graphs do not draw that.
        """
        if not self._form.draws_frame_zero and int(unit[0]) < 1:
            raise InputError(
                'these graphs do not draw frame 0: give a first frame, or export with Form(draws_frame_zero=True).'
            )
        clips = [jnp.asarray(clip, jnp.float32) for clip in (*history, x)]
        layout = dataclasses.replace(
            layout_of(clips, self.patch, prompt.text.shape[1]), text_sees_current=self._form.draws_frame_zero
        )
        frame_ids = envelope_frame_ids(jnp.asarray(unit), len(history))
        floor = np.float32(FORBIDDEN)
        place = jax.device_get(_named(_place(self._model, layout, frame_ids, jnp.asarray(prompt.mask))))
        conditioning = self.modulation_inputs(prompt, timestep)
        return {
            'patches': np.concatenate([self.patches(clip) for clip in clips]),
            'text': np.asarray(prompt.text, np.float32)[0],
            **{name: np.maximum(leaf, floor if name.startswith('bias') else leaf) for name, leaf in place.items()},
            **(conditioning if self._form.modulation_inside else self.modulation(conditioning)),
        }

    def modulation_inputs(self, prompt: Prompt, timestep: Float[Array, ' 1']) -> Feeds:
        """Return the inputs of the modulation graph for one example."""
        sinusoid = timestep_sinusoid(jnp.asarray(timestep), TIMESTEP_WIDTH)
        return {'timestep': np.asarray(sinusoid), 'pooled': np.asarray(prompt.pooled, np.float32)}

    def modulation(self, conditioning: Feeds) -> Feeds:
        """Return the outputs of the modulation graph, remembered: all units of a video share them."""
        key = b''.join(array.tobytes() for array in conditioning.values())
        if key not in self._vectors:
            while len(self._vectors) >= _REMEMBERED:
                del self._vectors[next(iter(self._vectors))]
            self._vectors[key] = {name: np.asarray(leaf) for name, leaf in self._modulate(conditioning).items()}
        return self._vectors[key]

    def _modulate_here(self, conditioning: Feeds) -> Feeds:
        model, params = self._model, self._params
        embedding = _embed_conditioning(model, _part(params, *_EMBEDDERS), *conditioning.values())
        blocks = [
            jax.device_get(_modulate_block(_on_host(params[f'modulators_{index}']), embedding))
            for index in range(model.config.num_layers - 1)
        ]
        vectors = Vectors(blocks, *_modulate_end(model, _part(params, *_ENDS), embedding))
        return {name: np.asarray(leaf).reshape(-1) for name, leaf in _named_vectors(vectors).items()}


def _for_export(model: PyramidMMDiT, form: Form) -> PyramidMMDiT:
    """Return the unrolled form, computing in float32."""
    return model.clone(scan=False, remat='none', dtype=jnp.float32, attention=form.attention, rotary=form.rotary)


def _on_host(params: Any) -> Any:
    """Return float32 arrays of the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
