"""Write a miniature text teacher with random weights, to try the text distillation without the released weights.

    python -m train.random_teacher --out out/random_teacher

Writes a T5 encoder and Pyramid-Flow's denoiser in their released layouts, with the widths of the tests' checkpoint, or
those of `--encoder`. With `--outliers`, some channels of the encoder's states are much larger than the others, as in
T5-XXL.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.output import output_folder
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.classes import COMPONENTS
from neodragon_jax.checkpoint.folders import PYRAMID_FLOW
from neodragon_jax.checkpoint.random_params import random_params
from neodragon_jax.config.neodragon import TINY, ComponentConfig, T5EncoderConfig
from neodragon_jax.config.pyramid_flow import TeacherMMDiTConfig
from neodragon_jax.generation.options import check_seed
from neodragon_jax.models.t5 import T5Encoder

TEXT_ENCODER, DENOISER = 'text_encoder', PYRAMID_FLOW

_DENOISER = TINY.denoiser
# Folder -> released class and sizes.
PARTS: dict[str, tuple[str, ComponentConfig]] = {
    TEXT_ENCODER: (
        'T5EncoderModel',
        T5EncoderConfig(
            vocab_size=TINY.t5.vocab_size, d_model=TINY.t5.out_dim, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        ),
    ),
    DENOISER: (
        'PyramidDiffusionMMDiT',
        TeacherMMDiTConfig(
            num_layers=2,
            num_attention_heads=_DENOISER.num_attention_heads,
            attention_head_dim=_DENOISER.attention_head_dim,
            sample_size=_DENOISER.sample_size,
            pos_embed_max_size=_DENOISER.pos_embed_max_size,
            joint_attention_dim=TINY.t5.out_dim,
            caption_projection_dim=_DENOISER.width,
            pooled_projection_dim=_DENOISER.pooled_projection_dim,
        ),
    ),
}


# Trained transformers have channels whose values are up to 20 times the others' and more (LLM.int8(), arXiv 2208.07339,
# section 4).
OUTLIER_GAIN = 30


def write(out: pathlib.Path, seed: int = 0, encoder: pathlib.Path | None = None, outliers: int = 0) -> None:
    """Write both components; other components in the folder are unchanged.

    Args:
      encoder: component folder of the T5 encoder to write; None for a random one.
      outliers: number of random channels of the encoder's states that are `OUTLIER_GAIN` times larger.
    Raises:
      InputError: `encoder` holds something else, or has fewer channels than `outliers`.
    """
    module, params = _encoder(seed) if encoder is None else checkpoint.load(encoder, T5Encoder)
    width = module.config.d_model
    if outliers > width:
        raise InputError(f'--outliers {outliers}: the states have {width} channels; give at most {width}.')
    chosen = np.random.default_rng(seed).choice(width, outliers, replace=False)
    params['final_norm']['scale'] = np.array(params['final_norm']['scale'])
    params['final_norm']['scale'][chosen] *= OUTLIER_GAIN
    checkpoint.save(out / TEXT_ENCODER, module, params)
    kind, config = PARTS[DENOISER]
    assert isinstance(config, TeacherMMDiTConfig)
    config = dataclasses.replace(config, joint_attention_dim=width)
    checkpoint.save(out / DENOISER, COMPONENTS[kind].build(config), random_params(kind, config, 1000 * seed + 1))


def _encoder(seed: int) -> tuple[Any, Any]:
    """Return a random T5 encoder."""
    kind, config = PARTS[TEXT_ENCODER]
    params = random_params(kind, config, 1000 * seed)
    # T5's embeddings are not scaled: with the usual small initialization, all tokens would look the same.
    params['token_embedding']['embedding'] *= 50
    return COMPONENTS[kind].build(config), params


def run(argv: Sequence[str] | None = None) -> None:
    """Write the components of a command line."""
    parser = command_parser(
        'python -m train.random_teacher',
        'Write a miniature text teacher with random weights, to try train.text without the released weights.',
        'examples:\n  python -m train.random_teacher --out out/random_teacher\n\n  with outlier channels:\n'
        '    python -m train.random_teacher --encoder LANGUAGE/t5 --outliers 2 --out out/outliers',
    )
    add = parser.add_argument
    add('--out', action=PathOption, default='out/random_teacher', metavar='DIR',
        help='folder of both components (default: %(default)s)')  # fmt: skip
    add('--encoder', action=PathOption, metavar='DIR',
        help='component folder of the T5 encoder to write (default: a random one)')  # fmt: skip
    add('--outliers', type=int, default=0, metavar='N',
        help=f'random channels of the states that are {OUTLIER_GAIN} times larger (default: %(default)s)')  # fmt: skip
    add('--seed', type=int, default=0, help='seed of the weights (default: %(default)s)')
    args = parser.parse_args(argv)
    if args.outliers < 0:
        raise InputError(f'--outliers {args.outliers}: give at least 0.')
    with output_folder(args.out):
        write(args.out, check_seed(args.seed), args.encoder, args.outliers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(argv))


if __name__ == '__main__':
    sys.exit(main())
