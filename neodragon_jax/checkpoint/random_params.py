"""Random parameters with the scale of trained ones, to measure time, memory and quantization without a download."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.checkpoint.classes import COMPONENTS
from neodragon_jax.config.neodragon import FULL, TINY, ComponentConfig, SystemConfig, T5EncoderConfig
from neodragon_jax.config.sdxl import FULL_IMAGE_VAE, FULL_UNET, TINY_IMAGE_VAE, TINY_UNET
from neodragon_jax.config.super_resolution import VARIANTS
from neodragon_jax.models.layers import sincos_table
from neodragon_jax.models.modulation import SIX_PARTS, TWO_PARTS

SMALL = 0.02  # deviation of embeddings and of conditioning layers

# `like_trained`: one in OUTLIER_EVERY channels has gains of OUTLIER_GAIN; kernels have TAILS degrees of freedom.
OUTLIER_EVERY, OUTLIER_GAIN, TAILS = 512, 10.0, 5
# Number of modulation vectors -> offsets that the model adds to them: 1 for gains, else 0.
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
# Components that the hybrid system does not use.
MULTISTEP = (folders.TEACHER_ADAPTER, folders.TEACHER)


def random_params(kind: str, config: ComponentConfig, seed: int) -> dict[str, Any]:
    """Return parameters that keep the scale of activations about constant; none is zero, so that errors stay visible.

    Kernels are normal with deviation 1 / sqrt(fan-in), embeddings with `SMALL`; gains are one, biases small. T5 does
    not divide its scores by sqrt(head width): its queries are smaller instead, as at the start of its training. The
    fixed positional table is the true one.
    """
    module = COMPONENTS[kind].build(config)
    rng = np.random.default_rng(seed)
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(abstract_params(module)))
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
    """Return random parameters with three properties that make trained ones hard to quantize.

    Kernels follow the heavy-tailed Student's t distribution with unchanged deviation. In all gains, including those of
    modulation, the same one in `OUTLIER_EVERY` channels is `OUTLIER_GAIN` times larger than the others: trained
    transformers have about 0.1% of such channels, up to 20 times larger (LLM.int8(), arXiv 2208.07339, section 4).
    Per-head gains are unchanged: with large ones, one key would get all the attention.

    The last layer of every residual branch is smaller by the root of the number of branches, as at the start of
    GPT-2's training (Radford et al. 2019, section 2.3): otherwise the rounding errors of hundreds of layers add up.
    The similarity to trained weights was not measured.
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
    """Return the paths of the last kernel of every residual branch."""
    return {path for path in paths if _BRANCH_ENDS.search('/'.join(path))}
