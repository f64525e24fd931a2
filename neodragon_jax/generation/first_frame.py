"""Prompt to the first frame's picture: SSD-1B, distilled to four steps, and the image VAE of SDXL.

`FirstFrameModel` holds one function per module, like `pipeline.Components`, so that whatever is exported slots into
the same places.

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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import image_to_frame
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.params import read_params
from neodragon_jax.generation.param_store import Store, Task, finish
from neodragon_jax.generation.tokens import ClipTokenizer
from neodragon_jax.models.clip import CLIPTextModel, CLIPTextOutput
from neodragon_jax.models.sdxl_unet import UNet2DConditionModel
from neodragon_jax.models.sdxl_vae import AutoencoderKL
from neodragon_jax.pyramid.sampler import POSTERIOR, Keys, fold_keys, white_noise

# The steps that the model was distilled to, and the noise schedule of the model before that.
TIMESTEPS = (999, 749, 499, 249)
BETAS = (0.00085, 0.012)
TRAIN_STEPS = 1000
# Width of the boundary at timestep 0, where a consistency function is the identity: deviation of the data, and the
# factor from timesteps to its unit.
DATA_DEVIATION, TIMESTEP_SCALE = 0.5, 10.0

# Names of the modules in a store.
TEXT_ENCODERS, UNET, DECODER = 'first frame: text encoders', 'first frame: UNet', 'first frame: decoder'

# Size of the released system's picture; the video shows it at half that size.
HEIGHT, WIDTH = 640, 1024

Latents = Float[Array, 'B h w C']


class Condition(NamedTuple):
    """What the UNet knows of a picture besides its noise."""

    text: Float[Array, 'B L T']  # penultimate states of both towers, side by side
    pooled: Float[Array, 'B P']  # pooled vector of the second tower
    sizes: Float[Array, 'B 6']  # original size, crop corner, target size


@runtime_checkable
class PictureNoise(Protocol):
    """Where the random numbers of a picture come from."""

    def initial(self, shape: tuple[int, ...]) -> Latents:
        """Return the white noise to start from."""
        ...

    def step(self, number: int, shape: tuple[int, ...]) -> Latents:
        """Return the white noise that is added after step `number`, counted from 0; none is after the last."""
        ...


@dataclasses.dataclass(frozen=True)
class DrawnPictureNoise:
    """Noise from one key per picture; the keys may be those of `sampler.DrawnNoise`, whose draws are others."""

    keys: Keys

    def initial(self, shape: tuple[int, ...]) -> Latents:
        return white_noise(fold_keys(self.keys, POSTERIOR + 1), shape[1:])

    def step(self, number: int, shape: tuple[int, ...]) -> Latents:
        return white_noise(fold_keys(self.keys, POSTERIOR + 2 + number), shape[1:])


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
        condition = shard(self.encode_prompt(prompts))
        yield condition
        latents = sample(self.denoise, (len(prompts), *self.latent_size), condition, noise, on_step)
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
        computes in the stored type. What the UNet embeds, norms and softmax stay float32.
      place: puts a tree of arrays on the devices.
      store: holds the parameters; default: one that reads them all now and places them with `place`.
    Raises:
      InputError: a component is missing, damaged or does not fit the others, or the size does not fit the model.
    """
    store = store or Store(place)
    unet_folder, unet = _find(root, folders.FIRST_FRAME_UNET, UNet2DConditionModel)
    vae_folder, vae = _find(root, folders.FIRST_FRAME_VAE, AutoencoderKL)
    factor = vae.config.spatial_factor
    multiple = factor * 2 ** (len(unet.config.block_out_channels) - 1)
    for name, size in (('height', height), ('width', width)):
        if size < multiple or size % multiple:
            near = max(multiple, round(size / multiple) * multiple)
            raise InputError(f'{name} {size} of the first frame is not a positive multiple of {multiple}; use {near}.')
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
    """Return the folder and the module of a component, which must be of one class."""
    folder = checkpoint.component_folder(root, name)
    module = checkpoint.load_module(folder)
    if not isinstance(module, kind):
        raise InputError(f'{folder}: holds a {type(module).__name__}; put the released {kind.__name__} there.')
    return folder, module


def _prompt_encoder(
    root: str | os.PathLike[str],
    unet: UNet2DConditionModel,
    size: tuple[int, int],
    dtype: Any,
    store: Store,
) -> Callable[[Sequence[str]], Condition]:
    """Return the function from prompts to what the UNet knows of pictures of that size."""
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
    """Return what the UNet knows of uncropped pictures of height x width pixels, from its two text towers.

    Source: arXiv 2307.01952, sections 2.1 (text) and 2.2 (sizes).
    """
    text = jnp.concatenate([first.hidden_states[-2], second.hidden_states[-2]], axis=-1)
    sizes = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
    return Condition(text, second.pooled, jnp.broadcast_to(sizes, (text.shape[0], sizes.shape[0])))


def sample(
    denoise: Callable[[Array, Array, Condition], Array],
    shape: tuple[int, int, int, int],
    condition: Condition,
    noise: PictureNoise,
    on_step: Callable[[int, Latents], object] = lambda number, x: None,
) -> Latents:
    """Generate scaled latents [B, h, w, C] in four steps, without guidance.

    Args:
      denoise: (latents, timestep [B], condition) -> the noise in the latents.
      on_step: called after every step with (number, latents), for progress and tests.
    """
    x = noise.initial(shape)
    for number, timestep in enumerate(TIMESTEPS):
        predicted = denoise(x, jnp.full((shape[0],), timestep, jnp.float32), condition)
        clean = consistency(x, predicted, timestep)
        if number + 1 < len(TIMESTEPS):
            x = add_noise(clean, noise.step(number, shape), TIMESTEPS[number + 1])
        else:
            x = clean
        on_step(number, x)
    return x


def signal_and_noise(timestep: int) -> tuple[float, float]:
    """Return the shares of signal and noise at a timestep; their squares sum to 1.

    The square roots of beta, the variance added per step, are evenly spaced (arXiv 2112.10752, appendix).
    """
    low, high = np.sqrt(BETAS)
    signal = np.prod(1 - np.linspace(low, high, TRAIN_STEPS)[: timestep + 1] ** 2)
    return float(np.sqrt(signal)), float(np.sqrt(1 - signal))


def boundary_weights(timestep: int) -> tuple[float, float]:
    """Return the weights of the input and of the prediction, which make the function an identity at timestep 0."""
    time = timestep * TIMESTEP_SCALE
    variance = time**2 + DATA_DEVIATION**2
    return DATA_DEVIATION**2 / variance, time / float(np.sqrt(variance))


def consistency(x: Latents, predicted_noise: Latents, timestep: int) -> Latents:
    """Return the clean latents that a step sees, in float32. Source: arXiv 2310.04378, equation 9."""
    signal, noise = signal_and_noise(timestep)
    keep, take = boundary_weights(timestep)
    clean = (x.astype(jnp.float32) - noise * predicted_noise.astype(jnp.float32)) / signal
    return take * clean + keep * x


def add_noise(clean: Latents, noise: Latents, timestep: int) -> Latents:
    """Return clean latents diffused to a timestep."""
    signal, deviation = signal_and_noise(timestep)
    return signal * clean + deviation * noise


def to_picture(pixels: Float[Array | np.ndarray, 'B H W 3']) -> UInt8[np.ndarray, 'B H W 3']:
    """Turn pictures in [-1, 1] into bytes: clamp, scale, and round, whereas a video's frames are truncated.

    Raises:
      InputError: a value is not a number.
    """
    pixels = np.asarray(pixels, np.float32)
    if np.isnan(pixels).any():
        raise InputError('the first frame has values that are not numbers; check the weights, or compute in float32.')
    return np.round(np.clip(pixels / 2 + np.float32(0.5), 0, 1) * 255).astype(np.uint8)


def to_frames(pictures: UInt8[np.ndarray, 'B h w 3'], height: int, width: int) -> Float[np.ndarray, 'B 1 H W 3']:
    """Resize pictures to the video's size and scale them to [-1, 1]: what `pipeline.generate` takes as first frames."""
    return np.stack([image_to_frame(picture, height, width) for picture in pictures])[:, None]
