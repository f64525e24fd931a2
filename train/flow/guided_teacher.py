"""The teacher as a denoiser for many videos: guidance in one program, and no work that is the same for several calls.

* One compiled program runs both prompts and guidance, per stage and kind of unit.
* The modulation, a third of the model's parameters, depends on the prompt and the timestep only. It is computed once
  for each, and the negative prompt's once for all samples of a batch.
* Unit 0 has no history, so that its sequence has no padding.

Legend: B batch, L text tokens, D width, p width of the pooled prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from neodragon_jax.models.layers import timestep_sinusoid
from neodragon_jax.models.mmdit import TIMESTEP_WIDTH, PyramidMMDiT
from neodragon_jax.pyramid.history import envelope_frame_ids
from neodragon_jax.pyramid.sampler import Denoiser, History, Plan, Prompt, Unit, guide, neighbors

# Guidance scale of each sample's unit.
_Scale = Callable[[Int[Array, ' B']], Float[Array, ' B']]


class Call(NamedTuple):
    """One call of a denoiser in a generation.

    Attributes:
      timestep: as the schedule's table has it.
    """

    unit: int
    stage: int
    step: int
    timestep: float


def calls_of(plan: Plan, first_unit: int) -> Iterator[Call]:
    """Yield the calls of `sampler.sample` in their order."""
    for unit in range(first_unit, plan.frames):
        for stage, count in enumerate(plan.unit_steps(unit)):
            for step, timestep in enumerate(plan.schedule.steps(stage, count).timesteps):
                yield Call(unit, stage, step, float(timestep))


class GuidedTeacher:
    """The teacher with guidance, for batches of videos of one plan.

    Attributes:
      module: the denoiser.
      modulate: (params, pooled [B, p], timestep) -> modulation of every prompt of a batch; compiled.
      flow: (params, modulation, history, x, unit [B], prompt) -> guided flow of a batch; compiled. The modulation is a
        pair: that of the negative prompt, for a batch of one, and that of the prompts.
    """

    def __init__(
        self, module: PyramidMMDiT, params: Callable[[], Any], negative: Prompt, scale: _Scale, plan: Plan, mesh: Mesh
    ) -> None:
        """Prepare.

        Args:
          negative: conditioning of the negative prompt: text [L, D], mask [L], pooled [p].
          scale: guidance scale of each sample's unit.
          plan: of the generation, without guidance.
          mesh: of parameters and batches.
        """
        self.module, self._params, self._negative, self._scale, self._plan = module, params, negative, scale, plan
        self._mesh = mesh.abstract_mesh
        self.modulate, self.flow = jax.jit(self._modulate_of), jax.jit(self._flow_of)
        self._negatives: dict[float, Any] = {}

    def denoiser(self, first_unit: int) -> Denoiser:
        """Return the denoiser for one call of `sampler.sample`, which starts at `first_unit`."""
        calls = calls_of(self._plan, first_unit)
        modulations: dict[tuple[bool, float], Any] = {}

        def predict(
            stage: int, history: History, x: Unit, unit: Array, prompt: Prompt, timestep: Float[Array, ' B']
        ) -> Unit:
            del timestep
            call = next(calls)
            assert call.stage == stage, 'the calls are those of the plan'
            params, key = self._params(), (call.unit == 0, call.timestep)
            if call.unit == 1 and call.step == 0 and stage == 0:
                modulations.clear()  # those of unit 0
            if key not in modulations:
                modulations[key] = self.modulate(params, prompt.pooled, jnp.float32(call.timestep))
            modulation = self._of_negative(params, call.timestep), modulations[key]
            return self.flow(params, modulation, list(history) if call.unit else [], x, unit, prompt)

        return predict

    def _of_negative(self, params: Any, timestep: float) -> Any:
        """Return the modulation of the negative prompt, for a batch of one."""
        if timestep not in self._negatives:
            pooled = jnp.asarray(self._negative.pooled)[None]
            self._negatives[timestep] = self.modulate(params, pooled, jnp.float32(timestep))
        return self._negatives[timestep]

    def _modulate_of(self, params: Any, pooled: Float[Array, 'B p'], timestep: Array) -> Any:
        sinusoid = timestep_sinusoid(jnp.broadcast_to(timestep, pooled.shape[:1]), TIMESTEP_WIDTH)
        return self.module.apply({'params': params}, sinusoid, pooled, method='modulate')

    def _flow_of(self, params: Any, modulation: Any, history: History, x: Unit, unit: Array, prompt: Prompt) -> Unit:
        batch = x.shape[0]
        null = jax.tree.map(lambda n, p: jnp.broadcast_to(n, p.shape), self._negative, prompt)
        given = list(history), x, unit
        (clips, x, unit, prompt) = neighbors((*given, null), (*given, prompt))

        # [..., B, 1, D]
        doubled = lambda n, p: neighbors(jnp.broadcast_to(n, p.shape), p, axis=p.ndim - 3)
        modulation = jax.tree.map(doubled, *modulation)
        frame_ids = envelope_frame_ids(unit, len(clips))
        inputs = ([*clips, x], prompt.text, prompt.mask, modulation, frame_ids)
        with jax.sharding.use_abstract_mesh(self._mesh):
            flow: Any = self.module.apply({'params': params}, *inputs, method='modulated')
        return guide(flow, self._scale(unit.reshape(batch, 2)[:, 1]))
