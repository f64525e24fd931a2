"""Write a checkpoint of random weights in the released layout: the whole system at its true size, without a download.

    python -m neodragon_jax.random_checkpoint --tokenizers tests/goldens/tiny_checkpoint --out out/random

What is measured on it (time, memory, sizes of exported graphs) is that of the released weights; its videos are noise.
With --like-trained it has some of what decides how hard trained weights are to quantize, see `like_trained`.
One component at a time is in memory, and one that is complete is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm
from flax import traverse_util

from neodragon_jax.base.atomic import atomic_folder
from neodragon_jax.base.errors import InputError, did_you_mean, exit_status
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.params import cast
from neodragon_jax.config.neodragon import FULL, TINY, ComponentConfig, SystemConfig, T5EncoderConfig
from neodragon_jax.config.sdxl import FULL_IMAGE_VAE, FULL_UNET, TINY_IMAGE_VAE, TINY_UNET
from neodragon_jax.config.super_resolution import VARIANTS
from neodragon_jax.models.layers import sincos_table
from neodragon_jax.models.modulation import SIX_PARTS, TWO_PARTS

TOKENIZERS = (*folders.TOKENIZERS, *folders.FIRST_FRAME_TOKENIZERS)
SMALL = 0.02  # deviation of embeddings and of conditioning layers

# Of so many channels one is so much larger, and so many degrees of freedom have the tails of kernels: `like_trained`.
OUTLIER_EVERY, OUTLIER_GAIN, TAILS = 512, 10.0, 5
# Of so many modulation vectors those are gains to which 1 is added.
_VECTORS = {len(parts): parts for parts in (SIX_PARTS, TWO_PARTS)}
# The last layers of residual branches, in all components.
_BRANCH_ENDS = re.compile(
    r'((attention|transformer_\d+)/out|(image|text)_out|mlp/linear_2|mlp_out|(resnet_\d+|mid|memory_\d+)/conv_2)/kernel$'
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One component folder: its released class and sizes."""

    kind: str
    config: ComponentConfig


def system_parts(system: SystemConfig, unet: ComponentConfig, image_vae: ComponentConfig) -> dict[str, Part]:
    """Return every component folder of the released checkpoint, and `quicksrnet` for --upscale."""
    denoiser, adapter = Part('PyramidMMDiT', system.denoiser), Part('ContextAdapter', system.context_adapter)
    clip_g = Part('CLIPTextModelWithProjection', system.clip_g)
    return {
        folders.CLIP_L: Part('CLIPTextModelWithProjection', system.clip_l),
        folders.CLIP_G: clip_g,
        folders.T5: Part('T5EncoderWithProjection', system.t5),
        folders.STUDENT_ADAPTER: adapter,
        folders.TEACHER_ADAPTER: adapter,
        folders.STUDENT: denoiser,
        folders.TEACHER: denoiser,
        folders.VIDEO_VAE: Part('AsymmetricCausalVideoVAE', system.video_vae),
        folders.FIRST_FRAME_CLIP_L: Part('CLIPTextModel', system.clip_l),
        folders.FIRST_FRAME_CLIP_G: clip_g,
        folders.FIRST_FRAME_UNET: Part('UNet2DConditionModel', unet),
        folders.FIRST_FRAME_VAE: Part('AutoencoderKL', image_vae),
        folders.SUPER_RESOLUTION: Part('QuickSRNet', VARIANTS['medium']),
    }


PRESETS = {'full': system_parts(FULL, FULL_UNET, FULL_IMAGE_VAE), 'tiny': system_parts(TINY, TINY_UNET, TINY_IMAGE_VAE)}
# What the hybrid system does not use.
MULTISTEP = (folders.TEACHER_ADAPTER, folders.TEACHER)


def random_params(kind: str, config: ComponentConfig, seed: int) -> dict[str, Any]:
    """Return parameters that keep the size of activations about constant: nothing is zero that a checkpoint has not.

    Kernels are normal with deviation 1 / sqrt(fan-in), embeddings with `SMALL`; gains are one, biases small. T5 does
    not divide its scores by sqrt(head width): its queries are smaller instead, as where it is trained from nothing. The
    fixed positional table is the true one.
    """
    module = checkpoint.COMPONENTS[kind].build(config)
    rng = np.random.default_rng(seed)
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(checkpoint.abstract_params(module)))
    params: dict[Any, Any] = {}
    for path, leaf in flat.items():
        if path[-1] == 'positions':
            assert isinstance(config, type(FULL.denoiser))
            base = config.sample_size // config.patch_size
            params[path] = np.asarray(sincos_table(config.pos_embed_max_size, config.width, base), leaf.dtype)
            continue
        values = rng.standard_normal(leaf.shape, np.float32)
        # The modulation's kernels [width, vectors, width] are the only ones of three dimensions.
        fan_in = leaf.shape[0] if len(leaf.shape) == 3 else math.prod(leaf.shape[:-1])
        if path[-1] == 'scale':
            values = 1 + SMALL * values
        else:
            values *= fan_in**-0.5 if path[-1] == 'kernel' else SMALL
        if path[-2:] == ('query', 'kernel') and isinstance(config, T5EncoderConfig):
            values *= config.d_kv**-0.5
        params[path] = values
    return traverse_util.unflatten_dict(params)


def like_trained(params: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return random parameters with some of what decides how hard trained ones are to quantize.

    Kernels follow Student's t, whose tails are heavy, with the deviation that they had. The same few channels, one in
    `OUTLIER_EVERY`, are `OUTLIER_GAIN` times larger than others in all gains, those of modulation too: trained
    transformers have about 0.1% of such channels, up to 20 times larger (LLM.int8(), arXiv 2208.07339, section 4).
    Gains of single heads are left: large ones would let one key take all attention.

    The last layer of every residual branch is smaller by the root of their number, as GPT-2's are where training
    starts (Radford et al. 2019, section 2.3): no branch then outweighs what it is added to. Where all branches are as
    large as that, the roundings of hundreds of layers add up. How near this is to trained weights was not measured.
    """
    rng, few = np.random.default_rng(seed), np.random.default_rng(0)
    widths: dict[int, np.ndarray] = {}
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(dict(params)))
    ends = branch_ends(flat)
    for path, values in flat.items():
        width = values.shape[-1]
        if path[-1] == 'kernel':
            tails = rng.standard_t(TAILS, values.shape).astype(np.float32)
            deviation = values.std() / math.sqrt(TAILS / (TAILS - 2)) / math.sqrt(len(ends) if path in ends else 1)
            flat[path] = tails * np.float32(deviation)
            continue
        modulates = any('modulator' in part for part in path)
        if width < OUTLIER_EVERY or not (modulates or path[-1] == 'scale'):
            continue
        if width not in widths:
            widths[width] = few.choice(width, width // OUTLIER_EVERY, replace=False)
        flat[path] = values.copy()
        if modulates:
            rows = np.flatnonzero(_VECTORS[len(values)])
            flat[path][np.ix_(rows, widths[width])] = OUTLIER_GAIN - 1
        else:
            flat[path][..., widths[width]] = OUTLIER_GAIN
    return traverse_util.unflatten_dict(flat)


def branch_ends(paths: Iterable[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Return the paths of the kernels that residual branches end with."""
    return {path for path in paths if _BRANCH_ENDS.search('/'.join(path))}


def write(
    out: pathlib.Path,
    parts: dict[str, Part],
    tokenizers: pathlib.Path,
    dtype: Any = None,
    seed: int = 0,
    trained: bool = False,
) -> list[str]:
    """Write component folders and copy tokenizers; return the names of those that were not there yet.

    Args:
      trained: whether parameters are changed by `like_trained`.
    Raises:
      InputError: a tokenizer folder is missing.
    """
    for name in TOKENIZERS:
        if not (tokenizers / name).is_dir():
            raise InputError(f'{tokenizers}: no {name} in it. Pass a checkpoint that has tokenizers with --tokenizers.')
    for name in TOKENIZERS:
        if not (out / name).is_dir():
            with atomic_folder(out / name) as partial:
                shutil.copytree(tokenizers / name, partial, dirs_exist_ok=True)
    made = []
    with tqdm.tqdm(parts.items(), unit='component', disable=None) as bar:
        for name, part in bar:
            bar.set_description(name)
            # A component's config is written last.
            if (out / name / 'config.json').is_file():
                continue
            own_seed = zlib.crc32(name.encode()) + seed
            params = random_params(part.kind, part.config, own_seed)
            params = cast(like_trained(params, own_seed) if trained else params, dtype)
            checkpoint.save(out / name, checkpoint.COMPONENTS[part.kind].build(part.config), params)
            made.append(name)
    return made


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        'python -m neodragon_jax.random_checkpoint',
        description='Write a checkpoint of random weights in the released layout, to measure the system without the '
        'released weights. Components that are complete are kept, so an interrupted run goes on.',
    )
    add = parser.add_argument
    add('--out', required=True, metavar='DIR', help='root of the new checkpoint')
    add('--size', choices=PRESETS, default='full', help='full: the released sizes, 12 GB in bfloat16 '
        '(default: %(default)s)')  # fmt: skip
    add('--tokenizers', required=True, metavar='DIR', help='checkpoint to copy the tokenizers from; a smaller '
        'vocabulary than the text encoders have is fine')  # fmt: skip
    add('--components', nargs='+', metavar='NAME', help='make these only (default: what --mode hybrid needs)')
    add('--dtype', choices=('float32', 'bfloat16'), default='bfloat16', help='default: %(default)s')
    add('--seed', type=int, default=0, help='default: %(default)s')
    add('--like-trained', action='store_true',
        help='with heavy tails, a few large channels and small residual branches, to try quantization on')  # fmt: skip
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write what a command line asks for."""
    parts = PRESETS[args.size]
    names = args.components or [name for name in parts if name not in MULTISTEP]
    for name in names:
        if name not in parts:
            raise InputError(
                f'--components {name}: no such component.{did_you_mean(name, parts)} Known: {", ".join(parts)}.'
            )
    chosen = {name: parts[name] for name in names}
    tokenizers, dtype = pathlib.Path(args.tokenizers), jnp.dtype(args.dtype)
    made = write(pathlib.Path(args.out), chosen, tokenizers, dtype, args.seed, args.like_trained)
    size = sum(path.stat().st_size for path in pathlib.Path(args.out).rglob('*') if path.is_file())
    print(f'{args.out}: {len(made)} components made, {len(chosen) - len(made)} kept; {size / 1e9:.2f} GB')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_args(argv)))


if __name__ == '__main__':
    sys.exit(main())
