"""Measure two ways to train all stages: one compiled step per stage, or one packed sequence with all of them.

    JAX_PLATFORMS=cpu python -m train.measure.packing --width 128 --blocks 4

Both run forward and backward on the same samples: the last unit of a full-size video at each of the three stages,
408, 648 and 1728 tokens with text. The packed sequence holds all 2784 under a block-diagonal mask, with modulation per
token. It is measured in its fastest form: unrolled blocks, so that the modulation is not stored per token and block, as
a scan over blocks would require.

Legend: B batch, S tokens of a sequence, D width.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neodragon_jax.base.command_line import command_parser, exit_status
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.mmdit import Condition, FinalModulation, PyramidMMDiT
from neodragon_jax.models.modulation import BlockModulation, Modulation
from neodragon_jax.models.rotary import Rotary
from neodragon_jax.pyramid.history import envelope_frame_ids, envelope_history
from neodragon_jax.pyramid.layout import FORBIDDEN, layout_of, patchify, unpatchify
from neodragon_jax.pyramid.stages import levels

STAGES, FRAMES, GRID, TEXT_TOKENS = 3, 7, (40, 64), 128


class Call(NamedTuple):
    """The arguments of one denoiser call."""

    clips: list[Float[Array, 'B _ _ _ C']]
    text: Float[Array, 'B L D']
    text_mask: Int[Array, 'B L']
    pooled: Float[Array, 'B p']
    timestep: Float[Array, ' B']
    frame_ids: Int[Array, 'B F']


def separate_flows(module: nn.Module, params: Any, calls: Sequence[Call]) -> list[Array]:
    """Return the flow of each call, in sequences of their own."""
    return [module.apply({'params': params}, *call) for call in calls]  # pyright: ignore[reportReturnType]


def packed_flows(module: PyramidMMDiT, params: Any, calls: Sequence[Call]) -> list[Array]:
    """Return the flow of each call, all in one sequence: texts, then histories, then current units."""
    apply: Callable[..., Any] = lambda *args, method: module.apply({'params': params}, *args, method=method)
    patch = module.config.patch_size
    layouts = [layout_of(call.clips, patch, call.text.shape[1]) for call in calls]
    conditions = [
        apply(layout, call.frame_ids, call.text_mask, call.pooled, call.timestep, method='condition')
        for layout, call in zip(layouts, calls, strict=True)
    ]
    texts = [layout.text_tokens for layout in layouts]
    currents = [layout.current_tokens for layout in layouts]
    pasts = [layout.image_tokens - current for layout, current in zip(layouts, currents, strict=True)]

    images = [jnp.concatenate([patchify(clip, patch) for clip in call.clips], axis=1) for call in calls]
    patches = _histories_first(images, pasts)
    text = jnp.concatenate([call.text for call in calls], axis=1)
    flow = apply(patches, text, merge(conditions, texts, pasts, currents), sum(currents), method='denoise')
    flows = jnp.split(flow, np.cumsum(currents)[:-1].tolist(), axis=1)
    return [unpatchify(flow, patch, layout.grids[-1]) for flow, layout in zip(flows, layouts, strict=True)]


def merge(conditions: Sequence[Condition], texts: list[int], pasts: list[int], currents: list[int]) -> Condition:
    """Return the condition of a packed sequence from those of its parts.

    Args:
      texts, pasts, currents: tokens of the text, the history and the current unit of each part.
    """
    order = _token_order(texts, pasts, currents)
    bias = _block_diagonal([condition.bias for condition in conditions])[:, :, order][:, :, :, order]
    current, words = _spread(currents), _spread(texts)
    image = lambda *vectors: jnp.concatenate([_spread(pasts)(*vectors), current(*vectors)], axis=-2)

    def block(*parts: BlockModulation) -> BlockModulation:
        return BlockModulation(
            jax.tree.map(image, *(part.image for part in parts)), jax.tree.map(words, *(part.text for part in parts))
        )

    def last_block(*parts: BlockModulation) -> BlockModulation:
        # Only the current tokens come out of its attention.
        mixed = {
            name: (image if name in ('shift_attention', 'gain_attention') else current)(
                *(getattr(part.image, name) for part in parts)
            )
            for name in Modulation._fields
        }
        return BlockModulation(Modulation(**mixed), jax.tree.map(words, *(part.text for part in parts)))

    blocks = [condition.blocks for condition in conditions]
    scanned = isinstance(blocks[0], BlockModulation)
    return Condition(
        positions=_histories_first([condition.positions[None] for condition in conditions], pasts)[0],
        rotary=Rotary(
            _histories_first([condition.rotary.cos for condition in conditions], pasts),
            _histories_first([condition.rotary.sin for condition in conditions], pasts),
        ),
        bias=bias,
        blocks=block(*blocks) if scanned else [block(*parts) for parts in zip(*blocks, strict=True)],
        last_block=last_block(*(condition.last_block for condition in conditions)),
        head=FinalModulation(*jax.tree.map(current, *(condition.head for condition in conditions))),
    )


def _histories_first(images: Sequence[Float[Array, 'B _ X']], pasts: list[int]) -> Float[Array, 'B _ X']:
    """Concatenate image tokens: all histories, then all current units."""
    histories = [image[:, :past] for image, past in zip(images, pasts, strict=True)]
    return jnp.concatenate(histories + [image[:, past:] for image, past in zip(images, pasts, strict=True)], axis=1)


def _token_order(texts: list[int], pasts: list[int], currents: list[int]) -> np.ndarray:
    """Return where each token of the packed sequence is in the concatenation of the parts' own sequences."""
    sizes = np.array([texts, pasts, currents])
    starts = np.cumsum(sizes.T.ravel()).reshape(sizes.T.shape).T - sizes
    return np.concatenate([np.arange(a, a + n) for a, n in zip(starts.ravel(), sizes.ravel(), strict=True)])


def _block_diagonal(biases: Sequence[Float[Array, 'B 1 _ _']]) -> Float[Array, 'B 1 S S']:
    """Return the attention bias of concatenated sequences that do not attend to one another."""
    rows, total, start = [], sum(bias.shape[-1] for bias in biases), 0
    for bias in biases:
        size = bias.shape[-1]
        sides = ((0, 0), (0, 0), (0, 0), (start, total - start - size))
        rows.append(jnp.pad(bias, sides, constant_values=FORBIDDEN))
        start += size
    return jnp.concatenate(rows, axis=2)


def _spread(counts: list[int]) -> Callable[..., Array]:
    """Return the function that repeats each part's vector [..., 1, D] for its tokens and joins the parts."""

    def spread(*vectors: Array) -> Array:
        repeated = [
            jnp.broadcast_to(vector, (*vector.shape[:-2], count, vector.shape[-1]))
            for vector, count in zip(vectors, counts, strict=True)
        ]
        return jnp.concatenate(repeated, axis=-2)

    return spread


def example_calls(config: MMDiTConfig, batch: int) -> list[Call]:
    """Return random calls for the last unit of a full-size video, one per stage, coarsest first."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    pyramid = levels(draw(batch, FRAMES, *GRID, config.in_channels), STAGES)
    unit = jnp.full((batch,), FRAMES - 1)
    return [
        Call(
            [*envelope_history(pyramid, unit, stage, FRAMES - 1), pyramid[stage][:, -1:]],
            draw(batch, TEXT_TOKENS, config.width),
            jnp.arange(TEXT_TOKENS)[None] < jnp.asarray(rng.integers(8, TEXT_TOKENS, (batch, 1))),
            draw(batch, config.pooled_projection_dim),
            jnp.asarray(rng.uniform(0, 1000, batch), jnp.float32),
            envelope_frame_ids(unit, FRAMES - 1),
        )
        for stage in range(STAGES)
    ]


def measure(flows: Callable[..., list[Array]], params: Any, calls: Sequence[Call], repeats: int) -> tuple[float, float]:
    """Return (seconds to compile, minimum seconds of a forward and backward pass over `repeats` passes)."""
    loss = lambda params, calls: sum(jnp.mean(jnp.square(flow)) for flow in flows(params, calls))
    start = time.perf_counter()
    step = jax.jit(jax.grad(loss)).lower(params, calls).compile()
    compiling = time.perf_counter() - start
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(step(params, calls))
        times.append(time.perf_counter() - start)
    return compiling, min(times[1:])


@dataclasses.dataclass(frozen=True)
class PackingOptions:
    """Options of this command.

    Attributes:
      width: of the denoiser, a multiple of 64.
      blocks: of the denoiser.
      batch: samples per stage.
      repeats: measured passes, of which the fastest counts.
    """

    width: int
    blocks: int
    batch: int
    repeats: int


def parse_options(argv: Sequence[str] | None = None) -> PackingOptions:
    """Return the options of a command line."""
    parser = command_parser('python -m train.measure.packing', str(__doc__))
    add = parser.add_argument
    add('--width', type=int, default=128, help='width of the denoiser, a multiple of 64 (default: %(default)s)')
    add('--blocks', type=int, default=4, help='blocks of the denoiser (default: %(default)s)')
    add('--batch', type=int, default=1, help='samples per stage (default: %(default)s)')
    add('--repeats', type=int, default=3, help='measured passes, of which the fastest counts (default: %(default)s)')
    return PackingOptions(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_options(argv)))


def run(options: PackingOptions) -> None:
    """Measure both forms and print the results."""
    # With a cached program, compilation would not be measured.
    jax.config.update('jax_enable_compilation_cache', False)
    heads = options.width // 64
    module = PyramidMMDiT(
        MMDiTConfig(num_layers=options.blocks, num_attention_heads=heads, caption_projection_dim=options.width)
    )
    calls = example_calls(module.config, options.batch)
    params = module.init(jax.random.key(0), *calls[0])['params']
    # Fresh gates are zero, so the blocks would not contribute to the output.
    params = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    separate = lambda params, calls: separate_flows(module, params, calls)
    packed = lambda params, calls: packed_flows(module, params, calls)
    pairs = zip(jax.jit(packed)(params, calls), jax.jit(separate)(params, calls), strict=True)
    print('largest difference of the flows:', max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs))

    rows = [measure(separate, params, [call], options.repeats) for call in calls]
    lengths = [layout_of(call.clips, module.config.patch_size, TEXT_TOKENS).tokens for call in calls]
    for length, (compiling, seconds) in zip(lengths, rows, strict=True):
        print(f'{length} tokens: compile {compiling:.1f} s, {seconds / options.batch:.3f} s per sample')
    _print_comparison(lengths, rows, measure(packed, params, calls, options.repeats), heads, options.batch)


def _print_comparison(
    lengths: Sequence[int],
    rows: Sequence[tuple[float, float]],
    packed: tuple[float, float],
    heads: int,
    batch: int,
) -> None:
    """Print both forms side by side.

    Args:
      lengths: tokens of each stage.
      rows: seconds to compile and to run each stage.
      packed: those of the packed sequence.
    """
    scores = lambda lengths: sum(4 * heads * length**2 for length in lengths)
    compiling, seconds = (sum(column) for column in zip(*rows, strict=True))
    packed_compiling, packed_seconds = packed
    print('                        compile s   s per sample   attention scores, MB per block and sample')
    for name, c, s, sizes in (
        ('one step per stage', compiling, seconds, lengths),
        ('packed', packed_compiling, packed_seconds, [sum(lengths)]),
    ):
        print(f'{name:22}  {c:9.1f}   {s / batch:12.3f}   {scores(sizes) / 1e6:.1f}')
    print(
        f'packed / separate: compile {packed_compiling / compiling:.2f}, time {packed_seconds / seconds:.2f}, '
        f'scores {scores([sum(lengths)]) / scores(lengths):.2f}'
    )


if __name__ == '__main__':
    sys.exit(main())
