"""The host's half of a denoiser call, and the sampler's denoiser over exported graphs.

Legend: B batch, h w a stage's grid, C channels, i patches of a clip, P values per patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from export.graphs.denoiser import SHIPPED, Form, for_export, placement
from export.graphs.modulation import modulate_blockwise, named
from export.graphs.runners import GraphRunner
from export.graphs.table import FORBIDDEN, Feeds, Params
from neodragon_jax.base.errors import InputError
from neodragon_jax.models.layers import timestep_sinusoid
from neodragon_jax.models.mmdit import TIMESTEP_WIDTH, PyramidMMDiT
from neodragon_jax.pyramid.history import envelope_frame_ids
from neodragon_jax.pyramid.layout import layout_of, patchify, unpatchify
from neodragon_jax.pyramid.sampler import Prompt, Unit

# Maximum number of cached modulations; a video needs one per stage and step.
_REMEMBERED = 32


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
        """Set up the host part.

        Args:
          params: unrolled parameters. Those of the modulation (2 GB at full size) are read block by block for each
            modulation and not kept in memory, because a video needs few modulations.
          form: form of the graphs.
          modulate: runs the modulation graph; None computes the modulation in JAX.
        """
        self.patch = model.config.patch_size
        self._form, self._model = form, for_export(model, form)
        self._vectors: dict[bytes, Feeds] = {}
        self._modulate = modulate or partial(modulate_blockwise, self._model, params)

    def patches(self, clip: Unit) -> Float[np.ndarray, 'i P']:
        """Split a clip of one example into patches, the format of graph inputs and outputs."""
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
          InputError: the unit is frame 0 and the graphs do not support it.
        """
        if not self._form.supports_frame_zero and int(unit[0]) < 1:
            raise InputError(
                'these graphs do not draw frame 0: give a first frame, or export with Form(supports_frame_zero=True).'
            )
        clips = [jnp.asarray(clip, jnp.float32) for clip in (*history, x)]
        layout = dataclasses.replace(
            layout_of(clips, self.patch, prompt.text.shape[1]), text_sees_current=self._form.supports_frame_zero
        )
        frame_ids = envelope_frame_ids(jnp.asarray(unit), len(history))
        floor = np.float32(FORBIDDEN)
        place = jax.device_get(named(placement(self._model, layout, frame_ids, jnp.asarray(prompt.mask))))
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
        """Return the outputs of the modulation graph, cached because all units of a video share them."""
        key = b''.join(array.tobytes() for array in conditioning.values())
        if key not in self._vectors:
            while len(self._vectors) >= _REMEMBERED:
                del self._vectors[next(iter(self._vectors))]
            self._vectors[key] = {name: np.asarray(leaf) for name, leaf in self._modulate(conditioning).items()}
        return self._vectors[key]


class GraphDenoiser:
    """`sampler.Denoiser` over one exported graph per stage; the host's half runs in JAX."""

    def __init__(self, host: DenoiserHost, runners: Sequence[GraphRunner]) -> None:
        self._host = host
        self._runners = runners

    def __call__(
        self, stage: int, history: Sequence[Unit], x: Unit, unit: Array, prompt: Prompt, timestep: Array
    ) -> Unit:
        """Return the flow of `x` in float32; the graphs take one example at a time."""
        flows = []
        for index in range(x.shape[0]):
            one = slice(index, index + 1)
            example = Prompt(*(field[one] for field in prompt))
            feeds = self._host.stage_inputs([clip[one] for clip in history], x[one], unit[one], example, timestep[one])
            flows.append(self._runners[stage].run(feeds)['flow'])
        patch = self._host.patch
        grid = (x.shape[2] // patch, x.shape[3] // patch)
        return unpatchify(jnp.asarray(np.stack(flows), jnp.float32), patch, grid)
