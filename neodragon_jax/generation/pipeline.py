"""Pipeline from prompt to video over a set of functions, one per module.

`Components` holds these functions. `load` makes compiled JAX functions; ONNX sessions and phone graphs can replace
them, so that every exported graph is tested inside the real program.

Legend: B batch, T latent frames, F video frames, H W pixels, h w latent grid.
Source: arXiv 2511.06055, figure 2 and section 4.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import to_uint8
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.params import read_params
from neodragon_jax.generation.defaults import SPATIAL_FACTOR, TEMPORAL_FACTOR
from neodragon_jax.generation.fit import Part, check_fit, text_parts
from neodragon_jax.generation.param_store import Store
from neodragon_jax.generation.phases import Task, finish, finite
from neodragon_jax.generation.tokens import Tokenizers, Tokens
from neodragon_jax.models.mmdit import PyramidMMDiT, stack_blocks
from neodragon_jax.models.vae import VideoVAE, denormalize, normalize, posterior_sample
from neodragon_jax.pyramid.sampler import (
    Denoiser,
    Keys,
    NoiseSource,
    Plan,
    Prompt,
    Unit,
    jax_denoiser,
    sample,
)

# Names of the modules in a store.
TEXT_ENCODERS, DENOISER = 'text encoders', 'denoiser'
VIDEO_ENCODER, VIDEO_DECODER = 'video encoder', 'video decoder'

Memories = Any


@dataclasses.dataclass(frozen=True)
class Components:
    """The modules of the system as functions.

    Attributes:
      encode_prompt: prompts (modifier included) -> Prompt.
      encode_image: frames [B, 1, H, W, 3] in [-1, 1] -> moments [B, 1, h, w, 32].
      denoise: see sampler.Denoiser.
      decode_step: (latent [B, 1, h, w, C], memories) -> (8 frames [B, 8, H, W, 3] in [-1, 1], memories).
      init_memories: (batch, h, w) -> memories of the decoder before the first frame.
      channels: C.
      patch: side of the denoiser's patches, in latent pixels.
      max_grid: rows and columns of patches that the denoiser has positions for.
      max_frames: latent frames that the denoiser has positions for.
      tokenizers: tokenizers of the prompts; None if they are not available.
    """

    encode_prompt: Callable[[Sequence[str]], Prompt]
    encode_image: Callable[[Array], Array]
    denoise: Denoiser
    decode_step: Callable[[Array, Memories], tuple[Array, Memories]]
    init_memories: Callable[[int, int, int], Memories]
    channels: int
    patch: int
    max_grid: int
    max_frames: int
    tokenizers: Tokenizers | None = None

    def check(self, plan: Plan) -> Plan:
        """Return the plan if this denoiser can run it.

        Raises:
          InputError: the latent channels, the grid or the length do not fit the model.
        """
        if plan.frames > self.max_frames:
            frames = TEMPORAL_FACTOR * (plan.frames - 1) + 1
            raise InputError(
                f'{frames} frames are {plan.frames} latent frames; the checkpoint has positions for {self.max_frames}; '
                f'use at most {TEMPORAL_FACTOR * (self.max_frames - 1) + 1} frames.'
            )
        rows, columns = plan.height // self.patch, plan.width // self.patch
        if max(rows, columns) > self.max_grid:
            side = self.max_grid * self.patch * SPATIAL_FACTOR
            raise InputError(
                f'{plan.height * SPATIAL_FACTOR}x{plan.width * SPATIAL_FACTOR} pixels need {rows}x{columns} patches; '
                f'the checkpoint has positions for {self.max_grid}x{self.max_grid}; use at most {side}x{side} pixels.'
            )
        return dataclasses.replace(plan, channels=self.channels)


def load(
    root: str | os.PathLike[str],
    mode: str = 'hybrid',
    denoiser: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    place: Callable[[Any], Any] = jax.device_put,
    store: Store | None = None,
) -> Components:
    """Load a released checkpoint as compiled JAX functions.

    Args:
      root: folder of the whole checkpoint.
      mode: 'hybrid' (few-step denoiser) or 'monolithic' (multi-step denoiser); each has its own context adapter.
      denoiser, adapter: component folders to use instead of the mode's own, such as a distilled student's.
      dtype: compute type; parameters are held in it if they are stored in a wider one, see `params.cast`. None
        computes in the stored type. Embeddings, modulation, norms and softmax of the denoiser stay float32.
      place: puts a tree of arrays on the devices.
      store: holds the parameters; default: one that reads them all now and places them with `place`.
    Raises:
      InputError: a component is missing or damaged, two are of different models, or the mode is unknown.
    """
    if mode not in folders.DENOISER_FOLDERS:
        raise InputError(f'mode {mode!r} is unknown; use one of {", ".join(folders.DENOISER_FOLDERS)}.')
    find = lambda name: checkpoint.component_folder(root, name)
    denoiser, store = pathlib.Path(denoiser or find(folders.DENOISER_FOLDERS[mode])), store or Store(place)
    vae = checkpoint.load_module(find(folders.VIDEO_VAE), VideoVAE).clone(dtype=dtype)
    text = text_parts(root, adapter or find(folders.ADAPTER_FOLDERS[mode]))
    sizes = Part(denoiser, checkpoint.load_module(denoiser, PyramidMMDiT))
    check_fit(text, sizes, Part(find(folders.VIDEO_VAE), vae))
    model, params = load_denoiser(denoiser, dtype, store)
    encode_image, decode_step = _vae_functions(vae, find(folders.VIDEO_VAE), dtype, store)
    tokenizers = Tokenizers.load(root)
    return Components(
        encode_prompt=_prompt_encoder(text, tokenizers, dtype, store),
        encode_image=encode_image,
        denoise=jax_denoiser(model.apply, params),
        decode_step=decode_step,
        init_memories=vae.init_memories,
        channels=model.config.in_channels,
        patch=model.config.patch_size,
        max_grid=model.config.pos_embed_max_size,
        max_frames=model.config.max_num_frames,
        tokenizers=tokenizers,
    )


def load_denoiser(folder: str | os.PathLike[str], dtype: Any, store: Store) -> tuple[PyramidMMDiT, Callable[[], Any]]:
    """Return a stored denoiser with scanned blocks, and the function that returns its parameters.

    Args:
      dtype: compute type, as in `load`.
      store: holds the parameters; it reads them once.
    Raises:
      InputError: the component is missing or damaged.
    """
    folder = pathlib.Path(folder)
    model = checkpoint.load_module(folder, PyramidMMDiT)
    layers = model.config.num_layers
    params = store.hold(DENOISER, lambda: stack_blocks(read_params(folder, dtype), layers))
    return model.clone(scan=True, dtype=dtype), params


def _vae_functions(
    vae: VideoVAE, folder: pathlib.Path, dtype: Any, store: Store
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the compiled encoder and decoder step, each with its own half of the parameters."""
    encoder = store.hold(VIDEO_ENCODER, lambda: read_params(folder, dtype, 'encoder', 'quant_conv'))
    decoder = store.hold(VIDEO_DECODER, lambda: read_params(folder, dtype, 'decoder', 'post_quant_conv'))
    encode = jax.jit(lambda params, video: vae.apply({'params': params}, video, method='encode'))
    step = jax.jit(lambda params, *args: vae.apply({'params': params}, *args, method='decode_step'))
    return lambda video: encode(encoder(), video), lambda latent, memories: step(decoder(), latent, memories)


def _prompt_encoder(
    parts: Mapping[str, Part], tokenizers: Tokenizers, dtype: Any, store: Store
) -> Callable[[Sequence[str]], Prompt]:
    """Return the function from prompts to the conditioning of the denoiser."""
    modules = {name: part.module.clone(dtype=dtype) for name, part in parts.items()}
    read = lambda: {name: read_params(part.folder, dtype) for name, part in parts.items()}
    params = store.hold(TEXT_ENCODERS, read)

    @jax.jit
    def encode(params: Any, tokens: Tokens) -> Prompt:
        run = lambda name, *args: modules[name].apply({'params': params[name]}, *args)
        pooled = [run('clip_l', tokens.clip_l_ids).pooled, run('clip_g', tokens.clip_g_ids).pooled]
        text = run('adapter', run('t5', tokens.t5_ids, tokens.t5_mask))
        # Float32 for every compute type, as in stored samples.
        text, joined = (x.astype(jnp.float32) for x in (text, jnp.concatenate(pooled, axis=-1)))
        return Prompt(text, jnp.asarray(tokens.t5_mask), joined)

    return lambda prompts: encode(params(), tokenizers(prompts))


def generate(
    components: Components,
    plan: Plan,
    prompts: Sequence[str],
    noise: NoiseSource,
    negative_prompt: str = '',
    first_frame: Float[Array | np.ndarray, 'B 1 H W 3'] | None = None,
    on_step: Callable[..., object] = lambda *_: None,
    shard: Callable[[Any], Any] = lambda tree: tree,
    on_decoded: Callable[[int], object] = lambda index: None,
) -> UInt8[np.ndarray, 'B F H W 3']:
    """Generate one video per prompt.

    Args:
      prompts: modifier included.
      first_frame: given first frames in [-1, 1]; None generates all frames.
      on_step: called after every denoising step, see `sampler.sample`.
      shard: distributes a tree of arrays with a leading batch axis over devices.
      on_decoded: called with the index of every latent frame that has been decoded.
    """
    return finish(
        generate_in_phases(components, plan, prompts, noise, negative_prompt, first_frame, on_step, shard, on_decoded)
    )


def generate_in_phases(
    components: Components,
    plan: Plan,
    prompts: Sequence[str],
    noise: NoiseSource,
    negative_prompt: str = '',
    first_frame: Float[Array | np.ndarray, 'B 1 H W 3'] | None = None,
    on_step: Callable[..., object] = lambda *_: None,
    shard: Callable[[Any], Any] = lambda tree: tree,
    on_decoded: Callable[[int], object] = lambda index: None,
) -> Task[UInt8[np.ndarray, 'B F H W 3']]:
    """Generate one video per prompt as a task, run by `phases`; arguments as in `generate`."""
    prompt = finite(shard(components.encode_prompt(prompts)), TEXT_ENCODERS)
    negative = None
    if plan.guidance is not None or plan.first_guidance is not None:
        negative = finite(shard(components.encode_prompt([negative_prompt] * len(prompts))), TEXT_ENCODERS)
    yield prompt, negative
    latent = None
    if first_frame is not None:
        latent = finite(encode_first_frame(components, shard(first_frame), noise), VIDEO_ENCODER)
    yield latent
    told = lambda *step: on_step(*step[:-1], finite(step[-1], DENOISER))
    latents = sample(components.denoise, plan, prompt, noise, negative, latent, told)
    yield latents
    return decode(components, latents, shard, on_decoded)


def encode_first_frame(
    components: Components, frame: Float[Array | np.ndarray, 'B 1 H W 3'], noise: NoiseSource
) -> Unit:
    """Return the normalized latent of a first frame: a sample of the encoder's posterior, not its mean."""
    moments = components.encode_image(jnp.asarray(frame)).astype(jnp.float32)
    shape = (*moments.shape[:-1], components.channels)
    return normalize(posterior_sample(moments, noise.posterior(shape)))


def decode(
    components: Components,
    latents: Float[Array, 'B T h w C'],
    shard: Callable[[Any], Any] = lambda tree: tree,
    on_decoded: Callable[[int], object] = lambda index: None,
) -> UInt8[np.ndarray, 'B F H W 3']:
    """Decode normalized latents frame by frame: each gives eight video frames, of which the first latent keeps one.

    Args:
      shard: distributes a tree of arrays with a leading batch axis over devices.
      on_decoded: called with the index of every latent frame that has been decoded.
    """
    latents = denormalize(latents)
    batch, frames, height, width, _ = latents.shape
    memories = shard(components.init_memories(batch, height, width))
    chunks = []
    for index in range(frames):
        pixels, memories = components.decode_step(latents[:, index : index + 1], memories)
        chunks.append(to_uint8(np.asarray(finite(pixels, VIDEO_DECODER))))
        on_decoded(index)
    return np.concatenate(chunks, axis=1)[:, TEMPORAL_FACTOR - 1 :]


def sample_keys(seed: int, prompts: Sequence[str], numbers: Sequence[int]) -> Keys:
    """Return one key per sample from the seed, the prompt's text and the sample's number.

    A sample then depends neither on the other videos of the run nor on the number of devices.
    """
    root = jax.random.key(seed)
    words = [jax.random.fold_in(root, zlib.crc32(prompt.encode())) for prompt in prompts]
    return jnp.stack([jax.random.fold_in(word, number) for word, number in zip(words, numbers, strict=True)])
