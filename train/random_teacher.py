"""Write a miniature text teacher with random weights, to try the text distillation without the released weights.

    python -m train.random_teacher --out out/random_teacher

Writes a T5 encoder and Pyramid-Flow's denoiser in their released layouts, with the widths of the tests' checkpoint.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.output import output_folder
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.classes import COMPONENTS
from neodragon_jax.checkpoint.folders import PYRAMID_FLOW
from neodragon_jax.checkpoint.random_params import random_params
from neodragon_jax.config.neodragon import TINY, ComponentConfig, T5EncoderConfig
from neodragon_jax.config.pyramid_flow import TeacherMMDiTConfig
from neodragon_jax.generation.options import check_seed

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


def write(out: pathlib.Path, seed: int = 0) -> None:
    """Write both components; other components in the folder are unchanged."""
    for number, (name, (kind, config)) in enumerate(PARTS.items()):
        params = random_params(kind, config, 1000 * seed + number)
        if kind == 'T5EncoderModel':
            # T5's embeddings are not scaled: with the usual small initialization, all tokens would look the same.
            params['token_embedding']['embedding'] *= 50
        checkpoint.save(out / name, COMPONENTS[kind].build(config), params)


def run(argv: Sequence[str] | None = None) -> None:
    """Write the components of a command line."""
    parser = command_parser(
        'python -m train.random_teacher',
        'Write a miniature text teacher with random weights, to try train.text without the released weights.',
        'example:\n  python -m train.random_teacher --out out/random_teacher',
    )
    add = parser.add_argument
    add('--out', action=PathOption, default='out/random_teacher', metavar='DIR',
        help='folder of both components (default: %(default)s)')  # fmt: skip
    add('--seed', type=int, default=0, help='seed of the weights (default: %(default)s)')
    args = parser.parse_args(argv)
    with output_folder(args.out):
        write(args.out, check_seed(args.seed))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(argv))


if __name__ == '__main__':
    sys.exit(main())
