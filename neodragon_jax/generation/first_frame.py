"""Prompt to the first frame's picture: SSD-1B, distilled to four steps, and the image VAE of SDXL.

`FirstFrameModel` holds one function per module, like `pipeline.Components`, so that exported graphs can replace them.

Legend: B pictures, H W pixels, h w latent grid, C latent channels, L text tokens, T width of both towers' states,
P pooled width.
Source: Neodragon, arXiv 2511.06055; Luo et al., Latent Consistency Models, arXiv 2310.04378, for the sampler; SDXL,
arXiv 2307.01952, section 2, for the conditioning.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import image_to_frame
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.params import read_params
from neodragon_jax.generation.consistency_sampler import Condition, Latents, PictureNoise, sample
from neodragon_jax.generation.param_store import Store
from neodragon_jax.generation.phases import Task, finish, finite
from neodragon_jax.generation.tokens import ClipTokenizer
from neodragon_jax.models.clip import CLIPTextModel, CLIPTextOutput
from neodragon_jax.models.sdxl_unet import UNet2DConditionModel
from neodragon_jax.models.sdxl_vae import AutoencoderKL

# Names of the modules in a store.
TEXT_ENCODERS, UNET, DECODER = 'first frame: text encoders', 'first frame: UNet', 'first frame: decoder'

# The released model draws at twice the video's size.
PICTURE_SCALE = 2
# Size of the released system's picture.
HEIGHT, WIDTH = 640, 1024


@dataclasses.dataclass(frozen=True)
class FirstFrameModel:
    """The modules of the first-frame model as functions; calling it turns prompts into pictures.

    Attributes:
      encode_prompt: prompts (modifier included) -> Condition.
      denoise: (latents, timestep [B], Condition) -> the noise in the latents.
      decode: latents -> pictures [B, H, W, 3] in [-1, 1].
      latent_size: h, w, C.
    """

    encode_prompt: Callable[[Sequence[str]], Condition]
    denoise: Callable[[Array, Array, Condition], Array]
    decode: Callable[[Array], Array]
    latent_size: tuple[int, int, int]

    def __call__(
        self,
        prompts: Sequence[str],
        noise: PictureNoise,
        shard: Callable[[Any], Any] = lambda tree: tree,
    ) -> UInt8[np.ndarray, 'B H W 3']:
        """Return one picture per prompt (modifier included).

        Args:
          shard: distributes a tree of arrays with a leading batch axis over devices.
        Raises:
          InputError: the prompts are not a list of texts, or the pictures have values that are not numbers.
        """
        return finish(self.drawing(prompts, noise, shard))

    def drawing(
        self,
        prompts: Sequence[str],
        noise: PictureNoise,
        shard: Callable[[Any], Any] = lambda tree: tree,
        on_step: Callable[[int, Latents], object] = lambda number, x: None,
    ) -> Task[UInt8[np.ndarray, 'B H W 3']]:
        """Draw pictures as a task with the phases of `memory`; arguments as in calling the model and in `sample`."""
        condition = finite(shard(self.encode_prompt(prompts)), TEXT_ENCODERS)
        yield condition
        latents = finite(sample(self.denoise, (len(prompts), *self.latent_size), condition, noise, on_step), UNET)
        yield latents
        return to_picture(np.asarray(self.decode(latents)))


def load(
    root: str | os.PathLike[str],
    height: int = HEIGHT,
    width: int = WIDTH,
    dtype: Any = None,
    place: Callable[[Any], Any] = jax.device_put,
    store: Store | None = None,
) -> FirstFrameModel:
    """Load the first-frame model of a released checkpoint as compiled JAX functions.

    Args:
      root: folder of the whole checkpoint.
      height, width: size of the pictures in pixels.
      dtype: compute type; parameters are held in it if they are stored in a wider one, see `params.cast`. None
        computes in the stored type. Embeddings, norms and softmax of the UNet stay float32.
      place: puts a tree of arrays on the devices.
      store: holds the parameters; default: one that reads them all now and places them with `place`.
    Raises:
      InputError: a component is missing, damaged or does not fit the others, or the size does not fit the model.
    """
    store = store or Store(place)
    unet_folder, unet = _find(root, folders.FIRST_FRAME_UNET, UNet2DConditionModel)
    vae_folder, vae = _find(root, folders.FIRST_FRAME_VAE, AutoencoderKL)
    factor = vae.config.spatial_factor
    _check_size(height, width, factor * 2 ** (len(unet.config.block_out_channels) - 1))
    encode_prompt = _prompt_encoder(root, unet, (height, width), dtype, store)
    unet, vae = unet.clone(dtype=dtype), vae.clone(dtype=dtype)
    unet_params = store.hold(UNET, lambda: read_params(unet_folder, dtype))
    # The encoder of this VAE is for training only.
    vae_params = store.hold(DECODER, lambda: read_params(vae_folder, dtype, 'decoder', 'post_quant_conv'))

    @jax.jit
    def denoise(params: Any, x: Array, timestep: Array, condition: Condition) -> Array:
        return unet.apply({'params': params}, x, timestep, *condition)

    @jax.jit
    def decode(params: Any, latents: Array) -> Array:
        return vae.apply({'params': params}, latents / vae.config.scaling_factor, method='decode')

    return FirstFrameModel(
        encode_prompt=encode_prompt,
        denoise=lambda *inputs: denoise(unet_params(), *inputs),
        decode=lambda latents: decode(vae_params(), latents),
        latent_size=(height // factor, width // factor, unet.config.in_channels),
    )


def _find(root: str | os.PathLike[str], name: str, kind: type) -> tuple[pathlib.Path, Any]:
    """Return the folder and the module of a component, which must have the given class."""
    folder = checkpoint.component_folder(root, name)
    return folder, checkpoint.load_module(folder, kind)


def _check_size(height: int, width: int, multiple: int) -> None:
    """Raise InputError unless both sides are positive multiples."""
    for name, size in (('height', height), ('width', width)):
        if size < multiple or size % multiple:
            near = max(multiple, round(size / multiple) * multiple)
            raise InputError(f'{name} {size} of the first frame is not a positive multiple of {multiple}; use {near}.')


def _prompt_encoder(
    root: str | os.PathLike[str],
    unet: UNet2DConditionModel,
    size: tuple[int, int],
    dtype: Any,
    store: Store,
) -> Callable[[Sequence[str]], Condition]:
    """Return the function from prompts to the conditioning of pictures of that size."""
    first_folder, first_tower = _find(root, folders.FIRST_FRAME_CLIP_L, CLIPTextModel)
    second_folder, second_tower = _find(root, folders.FIRST_FRAME_CLIP_G, CLIPTextModel)
    widths = (first_tower.config.hidden_size + second_tower.config.hidden_size, second_tower.config.projection_dim)
    expected = (unet.config.cross_attention_dim, unet.config.pooled_dim)
    if not second_tower.projection or widths != expected:
        raise InputError(
            f'{root}: the text encoders of SSD-1B give states and pooled vectors of widths {widths}, the UNet takes '
            f'{expected}. They belong to different models; copy the ssd_1b folders again.'
        )
    tokenizers = [
        ClipTokenizer.load(checkpoint.component_folder(root, name)) for name in folders.FIRST_FRAME_TOKENIZERS
    ]
    towers = {'first': first_folder, 'second': second_folder}
    params = store.hold(TEXT_ENCODERS, lambda: {name: read_params(folder, dtype) for name, folder in towers.items()})
    first_tower, second_tower = first_tower.clone(dtype=dtype), second_tower.clone(dtype=dtype)

    @jax.jit
    def encode(params: Any, first_ids: Array, second_ids: Array) -> Condition:
        first = first_tower.apply({'params': params['first']}, first_ids)
        second = second_tower.apply({'params': params['second']}, second_ids)
        return make_condition(first, second, *size)

    return lambda prompts: encode(params(), *(tokenizer(prompts) for tokenizer in tokenizers))


def make_condition(first: CLIPTextOutput, second: CLIPTextOutput, height: int, width: int) -> Condition:
    """Return the conditioning of uncropped pictures of height x width pixels, from the outputs of the two text towers.

    Source: arXiv 2307.01952, sections 2.1 (text) and 2.2 (sizes).
    """
    text = jnp.concatenate([first.hidden_states[-2], second.hidden_states[-2]], axis=-1)
    sizes = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
    return Condition(text, second.pooled, jnp.broadcast_to(sizes, (text.shape[0], sizes.shape[0])))


def picture_size(height: int, width: int) -> tuple[int, int]:
    """Return height and width of the picture that becomes the first frame of a video of that size, in pixels."""
    return PICTURE_SCALE * height, PICTURE_SCALE * width


def to_picture(pixels: Float[Array | np.ndarray, 'B H W 3']) -> UInt8[np.ndarray, 'B H W 3']:
    """Convert pictures in [-1, 1] to bytes: clamp, scale and round (frames of a video are truncated instead).

    Raises:
      InputError: a value is NaN.
    """
    pixels = np.asarray(pixels, np.float32)
    if np.isnan(pixels).any():
        raise InputError('the first frame has values that are not numbers; check the weights, or compute in float32.')
    return np.round(np.clip(pixels / 2 + np.float32(0.5), 0, 1) * 255).astype(np.uint8)


def to_frames(pictures: UInt8[np.ndarray, 'B h w 3'], height: int, width: int) -> Float[np.ndarray, 'B 1 H W 3']:
    """Resize pictures to the video's size and scale them to [-1, 1], as `pipeline.generate` takes first frames."""
    return np.stack([image_to_frame(picture, height, width) for picture in pictures])[:, None]
