"""Token streams before and after every block of a denoiser, for importance and feature matching.

The denoiser sows them (`joint_block.STREAMS`), in its scanned and in its unrolled form.

Legend: B batch, K blocks but the last, I image tokens, X current image tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neodragon_jax.models.joint_block import STREAMS
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.models.teacher import TeacherMMDiT
from neodragon_jax.pyramid.history import envelope_frame_ids
from neodragon_jax.pyramid.layout import layout_of, position_ids
from neodragon_jax.pyramid.sampler import Prompt


class Streams(NamedTuple):
    """Both token streams after one block, or after several blocks along a first axis."""

    image: Float[Array, '... B I D']
    text: Float[Array, '... B L D']


class Features(NamedTuple):
    """Token streams of one call of a denoiser.

    Attributes:
      first: streams before the first block.
      after: streams after every block but the last, [K, ...].
      last: image tokens of the current unit after the last block, which outputs no text stream.
      image_mask: 1 for tokens of real frames, 0 for padding of the history.
      text_mask: 1 for valid tokens.
    """

    first: Streams
    after: Streams
    last: Float[Array, 'B X D']
    image_mask: Int[Array, 'B I']
    text_mask: Int[Array, 'B L']


def with_features(module: PyramidMMDiT | TeacherMMDiT) -> Callable[..., tuple[Array, Features]]:
    """Return `apply` of a denoiser, for calls with frame ids, as a function that returns (flow, Features)."""

    def apply(
        variables: Mapping[str, Any],
        clips: Sequence[Float[Array, 'B _ _ _ C']],
        text: Array,
        text_mask: Int[Array, 'B L'],
        pooled: Array,
        timestep: Array,
        frame_ids: Int[Array, 'B F'],
    ) -> tuple[Array, Features]:
        inputs = (clips, text, text_mask, pooled, timestep, frame_ids)
        flow, seen = module.apply(variables, *inputs, mutable='intermediates')
        seen: Any = seen['intermediates']
        if isinstance(module, TeacherMMDiT):
            seen = seen['denoiser']
        layout = layout_of(clips, module.config.patch_size, text.shape[1])
        ids = position_ids(layout, frame_ids)[:, layout.text_tokens :]
        first = Streams(*seen[STREAMS][0])
        after = _after(seen, first, module.config.num_layers - 1, module.scan)
        last = seen['last_block'][STREAMS][0][0]
        return flow, Features(first, after, last, (ids >= 0).astype(jnp.int32), text_mask)  # pyright: ignore[reportReturnType]

    return apply


def observer(apply: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """Return a compiled function with the arguments of a `sampler.Denoiser` and the result of `apply`.

    Args:
      apply: a result of `with_features`, or a function that reduces its output.
    """

    @jax.jit
    def call(params: Any, history: Any, x: Array, unit: Array, prompt: Prompt, timestep: Array) -> Any:
        frame_ids = envelope_frame_ids(unit, len(history))
        return apply({'params': params}, [*history, x], prompt.text, prompt.mask, prompt.pooled, timestep, frame_ids)

    return lambda stage, history, *rest: call(params, list(history), *rest)


def _after(seen: Mapping[str, Any], first: Streams, blocks: int, scan: bool) -> Streams:
    """Return the streams after every block but the last."""
    if not blocks:
        return jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), first)
    if scan:
        return Streams(*seen['blocks'][STREAMS][0])
    each = [Streams(*seen[f'blocks_{index}'][STREAMS][0]) for index in range(blocks)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
