"""Check the estimate of `train.aot` against published training steps on TPUs.

    python -m train.measure.published_steps --models 16b,32b

The steps are those of MaxText's language models on one v5e-256 slice
(https://github.com/google/maxtext/blob/main/MaxText/configs/v5e): 2,048 tokens, full rematerialization, flash
attention, parameters sharded over all chips. The same step is written here, compiled for the slice on this machine's
CPU, and estimated like a step of this project. The report gives the error of the estimate. Each model takes minutes and
some GB.

The extra `tpu` is needed. Results are cached in --cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError, did_you_mean
from train.aot.chips import topology
from train.aot.compilation import facts_of
from train.aot.report import Case, Facts, estimate, text
from train.aot.request import QUIET
from train.aot.xla_flags import FLAGS
from train.runtime.sharding import FSDP

EXAMPLES = """examples:
  both steps, each of which takes minutes and some GB:
    python -m train.measure.published_steps --models 16b,32b
"""
TOPOLOGY, TOKENS, VOCABULARY, HEAD_DIM = 'v5e:16x16', 2048, 32000, 128
# Tile of the attention kernel.
TILE = 512
# Share of the peak rate by the compiler's schedule of this kernel, forward and backward: 2 and 5 products of a tile /
# the 2,010 and 2,832 cycles of its loop. Tiles above the diagonal are skipped; estimates count all of them.
VISITED = (TOKENS / TILE + 1) / (2 * TOKENS / TILE)
ATTENTION = (0.51 / VISITED, 0.90 / VISITED)


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model and its step.

    Attributes:
      batch: sequences per chip.
      published: TFLOP/s per chip.
    """

    width: int
    heads: int
    hidden: int
    layers: int
    batch: int
    published: float

    def flops(self) -> float:
        """Return the model FLOPs of a step per chip, as MaxText counts them: attention over all pairs of tokens."""
        attention = self.heads * HEAD_DIM
        products = self.layers * (4 * self.width * attention + 3 * self.width * self.hidden) + self.width * VOCABULARY
        pairs = 2 * self.layers * attention * TOKENS
        return 6 * self.batch * TOKENS * (products + pairs)


MODELS = {
    '16b': Model(4096, 64, 28672, 32, 6, 120.0),
    '32b': Model(8192, 64, 28672, 32, 4, 132.0),
}


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters; those of the layers are stacked."""
    layer = {
        'norm_attention': (model.width,),
        **{name: (model.width, model.heads, HEAD_DIM) for name in ('query', 'key', 'value')},
        'out': (model.width, model.heads, HEAD_DIM),
        'norm_mlp': (model.width,),
        **{name: (model.width, model.hidden) for name in ('gate', 'up', 'down')},
    }
    stacked = {name: (model.layers, *shape) for name, shape in layer.items()}
    return stacked | {'embed': (model.width, VOCABULARY), 'norm': (model.width,), 'head': (model.width, VOCABULARY)}


def attend(q: Float[Array, 'B N S K'], k: Float[Array, 'B N S K'], v: Float[Array, 'B N S K']) -> Array:
    """Return causal attention by the flash kernel; the batch is local."""
    tiles = dict.fromkeys(('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv'), TILE)
    sizes = pallas.BlockSizes(**tiles, block_kv_dkv_compute=TILE, use_fused_bwd_kernel=True)
    mask = pallas.MultiHeadMask([pallas.CausalMask((TOKENS, TOKENS))] * q.shape[1])
    out: Any = jax.vmap(pallas.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1))(q, k, v)
    return out


def normalize(x: Float[Array, 'B S D'], scale: Float[Array, ' D']) -> Float[Array, 'B S D']:
    """Return the root-mean-square normalization."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def rotate(x: Float[Array, 'B N S K']) -> Float[Array, 'B N S K']:
    """Return queries or keys with rotary positions."""
    angles = np.outer(np.arange(TOKENS), 1e4 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
    cos, sin = jnp.asarray(np.cos(angles), x.dtype), jnp.asarray(np.sin(angles), x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def block(mesh: Mesh, x: Float[Array, 'B S D'], weights: dict[str, Array]) -> tuple[Array, None]:
    """Return the output of one decoder layer."""
    local = PartitionSpec(FSDP)
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, local))
    w = {name: leaf.astype(x.dtype) for name, leaf in weights.items()}
    normed = normalize(x, weights['norm_attention'])
    q, k, v = (jnp.einsum('bsd,dnk->bnsk', normed, w[name]) for name in ('query', 'key', 'value'))
    kernel = jax.shard_map(attend, mesh=mesh, in_specs=(local,) * 3, out_specs=local, check_vma=False)
    context = kernel(rotate(q) / math.sqrt(HEAD_DIM), rotate(k), v).astype(x.dtype)
    x = x + jnp.einsum('bnsk,dnk->bsd', context, w['out'])
    normed = normalize(x, weights['norm_mlp'])
    hidden = jax.nn.silu(normed @ w['gate']) * (normed @ w['up'])
    return x + jnp.einsum('bsf,df->bsd', hidden, w['down']), None


def loss(mesh: Mesh, params: dict[str, Array], tokens: Int[Array, 'B S']) -> Float[Array, '']:
    """Return the mean cross entropy of the next token."""
    outer = {name: params[name] for name in ('embed', 'norm', 'head')}
    layers = {name: leaf for name, leaf in params.items() if name not in outer}
    one_hot = jax.nn.one_hot(tokens, VOCABULARY, dtype=jnp.bfloat16)
    x = jnp.einsum('bsv,dv->bsd', one_hot, outer['embed'].astype(jnp.bfloat16))
    x, _ = jax.lax.scan(jax.checkpoint(functools.partial(block, mesh)), x, layers)
    logits = jnp.einsum('bsd,dv->bsv', normalize(x, outer['norm']), outer['head'].astype(jnp.bfloat16))
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens).mean()


def lower(model: Model, mesh: Mesh) -> Any:
    """Return the lowered training step: loss, gradient and AdamW in float32, everything sharded over all chips."""
    optimizer = optax.adamw(1e-4, b1=0.9, b2=0.95)

    def at(shape: tuple[int, ...], dtype: Any = jnp.float32, axis: int = 0) -> jax.ShapeDtypeStruct:
        spec: list[str | None] = [None] * len(shape)
        if shape:
            spec[axis] = FSDP
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    # Every parameter is split along the width, the first axis after that of the layers.
    width = lambda shape: at(shape, axis=shape.index(model.width) if len(shape) > 1 or shape == (model.width,) else 0)
    params = {name: width(shape) for name, shape in shapes(model).items()}
    state = jax.tree.map(lambda leaf: width(leaf.shape) if leaf.shape else leaf, jax.eval_shape(optimizer.init, params))

    def step(params: dict[str, Array], state: Any, tokens: Int[Array, 'B S']) -> tuple[Any, Any, Array]:
        value, gradient = jax.value_and_grad(functools.partial(loss, mesh))(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    tokens = at((model.batch * mesh.size, TOKENS), jnp.int32)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens)


def compile_model(name: str, cache: str) -> tuple[Case, Facts]:
    """Return the case and the facts of a published step."""
    model, slice_ = MODELS[name], topology(TOPOLOGY)
    mesh = Mesh(np.array(slice_.compile_devices()), (FSDP,), axis_types=(AxisType.Auto,))
    start = time.perf_counter()
    lowered = lower(model, mesh)
    facts = facts_of(lowered, mesh, slice_, FLAGS, cache, time.perf_counter() - start)
    batch = model.batch * mesh.size
    case = Case(f'MaxText {name}', 'step', 1.0, slice_, (1, mesh.size, 1), batch, batch, {}, model.flops() * mesh.size)
    return case, facts


def run(models: Sequence[str], cache: str) -> None:
    """Print the estimate of each model beside the published figure."""
    for name in models:
        if name not in MODELS:
            raise InputError(f'--models {name}: no such model.{did_you_mean(name, MODELS)} Use {", ".join(MODELS)}.')
    jax.config.update('jax_platforms', 'cpu')
    os.environ.update(QUIET)
    for name in models:
        case, facts = compile_model(name, cache)
        print(text(case, facts))
        if not facts.compiled:
            continue
        per_chip = case.model_flops / case.devices
        best, worst = (per_chip / seconds / 1e12 for seconds in estimate(case, facts, ATTENTION).step_s)
        given = MODELS[name].published
        print(
            f'MaxText {name}: published {given:.0f} TFLOP/s per chip; estimated {best:.0f} with communication hidden '
            f'({best / given - 1:+.1%}), {worst:.0f} with all of it exposed ({worst / given - 1:+.1%})\n'
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    description = 'Check the estimate of train.aot against published training steps on TPUs; needs the extra `tpu`.'
    parser = command_parser('python -m train.measure.published_steps', description, EXAMPLES)
    add = parser.add_argument
    add('--models', default=','.join(MODELS), metavar='LIST', help='names, separated by commas (default: %(default)s)')
    add('--cache', action=PathOption, default='out/aot', metavar='DIR', help='folder of results (default: %(default)s)')
    return exit_status(lambda: _run_parsed(parser.parse_args(argv)))


def _run_parsed(args: argparse.Namespace) -> None:
    run(args.models.split(','), args.cache)


if __name__ == '__main__':
    sys.exit(main())
