"""The table of graphs that run on the phone, and what the host computes for them.

A graph is a function of arrays of static shape, closed over its parameters. What depends on the prompt, the timestep
or the place in the video only (masks, rotary tables, modulation) the host computes in float32 and passes in: the
graphs then hold no index arithmetic, and padding frames are masked exactly.

Legend: B batch, C channels, h w a stage's latent grid, L text tokens, I image tokens, S = L + I, D width, K head dim,
P numbers in a patch, X current image tokens. Source: arXiv 2511.06055, section 4 and table 9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neodragon_jax.layout import Layout, layout_of, patchify
from neodragon_jax.models.mmdit import Condition, PyramidMMDiT
from neodragon_jax.pyramid import envelope, envelope_frame_ids
from neodragon_jax.sampler import Prompt, Unit

Params = Mapping[str, Any]
Feeds = dict[str, np.ndarray]

# Added to forbidden scores on the phone: leaks exp(-100), and spans little of a 16-bit range.
FORBIDDEN = -100.0


@dataclasses.dataclass(frozen=True)
class Deployment:
    """How a graph ships, and how faithful it must be.

    Attributes:
      precision: 'w8a16' (8-bit weights, 16-bit activations) or 'fp16'.
      target_db: lowest signal-to-noise ratio against JAX in float32.
      calibration_samples: inputs that the ranges of activations are measured on.
    """

    precision: str
    target_db: float
    calibration_samples: int = 0


# THE table (arXiv 2511.06055, table 9). A new module needs a row here, and a function like `denoiser_graphs`.
DEPLOYMENTS: dict[str, Deployment] = {
    'denoiser_stage0': Deployment('w8a16', target_db=29.0, calibration_samples=300),
    'denoiser_stage1': Deployment('w8a16', target_db=22.0, calibration_samples=300),
    'denoiser_stage2': Deployment('w8a16', target_db=24.0, calibration_samples=300),
}


@dataclasses.dataclass(frozen=True)
class Graph:
    """One function for the phone.

    Attributes:
      name: its row in `DEPLOYMENTS`.
      function: takes the inputs in order, returns the only output.
      inputs: float32 inputs and their shapes.
      output: name of the output.
    """

    name: str
    function: Callable[..., Array]
    inputs: Mapping[str, tuple[int, ...]]
    output: str

    @property
    def deployment(self) -> Deployment:
        """The graph's row in the table."""
        return DEPLOYMENTS[self.name]


def denoiser_graphs(
    model: PyramidMMDiT, params: Params, units: int, grid: tuple[int, int], text_tokens: int, stages: int
) -> list[Graph]:
    """Return one graph per stage: `denoise` at the shape of the last unit, which holds all earlier units too.

    Inputs: `patches` [I, P] of all clips, oldest first, padding included; `text` [L, D]; and the fields of Condition
    by their path, such as `blocks.3.image.gate_mlp` [1, D]. Output: `flow` [X, P].

    Args:
      model: of any form; exported unrolled, in float32.
      params: unrolled.
      units: history frames.
      grid: patches (rows, columns) of a full-size latent frame.
    """
    model = _for_export(model)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    return [
        _denoiser_graph(f'denoiser_stage{stage}', model, params, envelope(stage, units, stages, grid, text_tokens))
        for stage in range(stages)
    ]


def _denoiser_graph(name: str, model: PyramidMMDiT, params: Params, layout: Layout) -> Graph:
    """Close `denoise` over its parameters and its positional rows."""
    config = model.config
    examples = (
        jnp.zeros((1, len(layout.grids)), jnp.int32),
        jnp.zeros((1, layout.text_tokens), jnp.int32),
        jnp.zeros((1, config.pooled_projection_dim)),
        jnp.zeros(1),
    )
    host = _host_params(params)
    positions = np.asarray(_condition(model, layout, host, *examples).positions)
    shapes = jax.eval_shape(partial(_condition, model, layout), host, *examples)._replace(positions=None)
    tree = jax.tree.structure(shapes)

    def denoise(patches: Array, text: Array, *leaves: Array) -> Array:
        condition = jax.tree.unflatten(tree, leaves)._replace(positions=positions)
        flow = model.apply({'params': params}, patches, text, condition, layout.current_tokens, method='denoise')
        assert isinstance(flow, jax.Array)
        return flow

    inputs = {
        'patches': (layout.image_tokens, config.patch_dim),
        'text': (layout.text_tokens, config.width),
        **{path: leaf.shape[-2:] if leaf.ndim == 3 else leaf.shape for path, leaf in _paths(shapes)},
    }
    return Graph(name, denoise, inputs, 'flow')


class DenoiserHost:
    """The host's half of a denoiser call.

    Attributes:
      patch: side of a patch, in latent pixels.
    """

    def __init__(self, model: PyramidMMDiT, params: Params) -> None:
        self.patch = model.config.patch_size
        self._model = _for_export(model)
        self._params = jax.device_put(_host_params(params))

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
        """Return all inputs of a stage's graph for one example; the arguments are those of `sampler.Denoiser`."""
        clips = [jnp.asarray(clip, jnp.float32) for clip in (*history, x)]
        layout = layout_of(clips, self.patch, prompt.text.shape[1])
        frame_ids = envelope_frame_ids(jnp.asarray(unit), len(history))
        condition = _condition(self._model, layout, self._params, frame_ids, prompt.mask, prompt.pooled, timestep)
        vectors = {
            path: np.asarray(leaf, np.float32)[0] if leaf.ndim == 3 else np.asarray(leaf, np.float32)
            for path, leaf in _paths(condition._replace(positions=None))
        }
        return {
            'patches': np.concatenate([self.patches(clip) for clip in clips]),
            'text': np.asarray(prompt.text, np.float32)[0],
            **vectors,
            'bias': np.maximum(vectors['bias'], np.float32(FORBIDDEN)),
        }


@partial(jax.jit, static_argnums=(0, 1))
def _condition(
    model: PyramidMMDiT, layout: Layout, params: Params, frame_ids: Array, mask: Array, pooled: Array, timestep: Array
) -> Condition:
    args = (layout, frame_ids, mask, pooled, timestep)
    return model.apply({'params': params}, *args, method='condition')  # pyright: ignore[reportReturnType]


def _for_export(model: PyramidMMDiT) -> PyramidMMDiT:
    """Return the unrolled form, computing in float32."""
    return model.clone(scan=False, remat='none', dtype=jnp.float32)


def _host_params(params: Params) -> Params:
    """Return the parameters that `condition` reads."""
    read = ('time_embed', 'pooled_embed', 'positions', 'modulators_', 'last_modulator', 'head_modulator')
    return {name: tree for name, tree in params.items() if name.startswith(read)}


def _paths(condition: Condition) -> list[tuple[str, Any]]:
    """Return the leaves with their paths, such as `blocks.3.image.gate_mlp`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(condition)
    return [(jax.tree_util.keystr(path, simple=True, separator='.'), leaf) for path, leaf in leaves]
