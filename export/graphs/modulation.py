"""AdaLN modulation of the denoiser as a separate graph, run once per stage and step of a video.

Legend: D width, t width of the timestep's sinusoid, p width of the pooled prompt.
Source: arXiv 2511.06055, section 4.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from export.graphs.stored_params import read_part, to_float32
from export.graphs.table import MODULATION, Feeds, Params, PhoneGraph
from neodragon_jax.models.mmdit import TIMESTEP_WIDTH, PyramidMMDiT
from neodragon_jax.models.modulation import BlockModulator


def modulation_graph(model: PyramidMMDiT, params: Params) -> PhoneGraph:
    """Return the graph that computes the AdaLN vectors of all blocks; it holds a third of the parameters.

    Inputs: `timestep` [1, t], the timestep's sinusoid; `pooled` [1, p]. Outputs: the vectors [D], under the input names
    of the stages' graphs.
    """
    model = unroll(model)

    def modulate(_: Params, sinusoid: Array, pooled: Array) -> tuple[Array, ...]:
        vectors = _modulate(model, read_part(params, *_MODULATORS), sinusoid, pooled)
        return tuple(leaf.reshape(-1) for leaf in named_vectors(vectors).values())

    inputs = {'timestep': (1, TIMESTEP_WIDTH), 'pooled': (1, model.config.pooled_projection_dim)}
    return PhoneGraph(
        MODULATION, modulate, inputs, tuple(named_vectors(vector_shapes(model))), compares_all_outputs=True
    )


class Vectors(NamedTuple):
    """All AdaLN vectors, each [1, 1, D]; the fields of Condition that depend on the timestep."""

    blocks: Any
    last_block: Any
    head: Any


_EMBEDDERS, _ENDS = ('time_embed', 'pooled_embed'), ('last_modulator', 'head_modulator')
_MODULATORS = (*_EMBEDDERS, 'modulators_', *_ENDS)


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


def vector_shapes(model: PyramidMMDiT) -> Vectors:
    args = jnp.zeros((1, TIMESTEP_WIDTH)), jnp.zeros((1, model.config.pooled_projection_dim))
    made = jax.eval_shape(partial(model.init, method='modulate'), jax.random.key(0), *args)
    return jax.eval_shape(partial(_modulate, model), made['params'], *args)


def named(tree: Any) -> dict[str, Any]:
    """Return the leaves by their path, such as `blocks.3.image.gate_mlp`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}


def named_vectors(vectors: Vectors) -> dict[str, Any]:
    return named(vectors._asdict())


def unroll(model: PyramidMMDiT) -> PyramidMMDiT:
    """Return the denoiser with unrolled blocks, computing in float32."""
    return model.clone(scan=False, remat='none', dtype=jnp.float32)


def modulate_blockwise(model: PyramidMMDiT, params: Params, conditioning: Feeds) -> Feeds:
    """Return the outputs of the modulation graph, computed in JAX; reads the parameters of one block at a time.

    Args:
      model: unrolled.
      conditioning: inputs of the graph.
    """
    embedding = _embed_conditioning(model, read_part(params, *_EMBEDDERS), *conditioning.values())
    blocks = [
        jax.device_get(_modulate_block(to_float32(params[f'modulators_{index}']), embedding))
        for index in range(model.config.num_layers - 1)
    ]
    vectors = Vectors(blocks, *_modulate_end(model, read_part(params, *_ENDS), embedding))
    return {name: np.asarray(leaf).reshape(-1) for name, leaf in named_vectors(vectors).items()}
