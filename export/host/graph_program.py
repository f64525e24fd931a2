"""The pipeline with graph runners in place of its modules.

Runners of any kind (JAX, ONNX Runtime, the HTP simulator) use the same control flow, so that every graph is tested
inside the real program. `TextHost` and `FirstFrameHost` hold the parts that stay on the host: tokenizers, embedding
tables, and the UNet's embedder.

Legend: B batch, F video frames, H W pixels, h w latent grid, C channels, L text tokens.
Source: arXiv 2511.06055, section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from export.graphs import pictures as picture_graphs
from export.graphs import text as text_graphs
from export.graphs.runners import GraphRunner
from export.graphs.stored_params import read_float32
from export.graphs.table import Feeds
from export.host.modules import FIRST_FRAME, ProgramOptions
from neodragon_jax.checkpoint import folders
from neodragon_jax.generation import consistency_sampler, first_frame, pipeline
from neodragon_jax.generation.tokens import ClipTokenizer, Tokenizers
from neodragon_jax.models.clip import CLIPTextOutput
from neodragon_jax.models.sdxl_unet import UNet2DConditionModel
from neodragon_jax.models.sdxl_vae import AutoencoderKL
from neodragon_jax.models.vae import VideoVAE
from neodragon_jax.pyramid.sampler import Denoiser, Prompt

Runners = Mapping[str, GraphRunner]


@dataclasses.dataclass(frozen=True)
class TextHost:
    """The host's part of the text encoders.

    Attributes:
      tokenizers: tokenizers of the three text encoders.
      clip_l, clip_g, t5: embedding tables of the encoders.
      vae: the video VAE's module, which gives the shapes of the decoder's memories.
    """

    tokenizers: Tokenizers
    clip_l: text_graphs.ClipHost
    clip_g: text_graphs.ClipHost
    t5: text_graphs.T5Host
    vae: VideoVAE

    @classmethod
    def load(cls, options: ProgramOptions) -> TextHost:
        """Read the tables of a checkpoint."""
        return cls(
            Tokenizers.load(options.root),
            text_graphs.ClipHost.load(options.find(folders.CLIP_L)),
            text_graphs.ClipHost.load(options.find(folders.CLIP_G)),
            text_graphs.T5Host.load(options.find(folders.T5)),
            text_graphs.open_component(options.find(folders.VIDEO_VAE), VideoVAE),
        )

    def encode_prompt(self, runners: Runners, prompts: Sequence[str]) -> Prompt:
        """Encode prompts for the denoiser with four graphs."""
        tokens = self.tokenizers(prompts)
        pooled, texts = [], []
        for clip_l, clip_g, ids, mask in zip(*tokens, strict=True):
            towers = (('clip_l', self.clip_l, clip_l), ('clip_g', self.clip_g, clip_g))
            parts = [runners[name].run(_tower_inputs(tower, row, end=True))['pooled'] for name, tower, row in towers]
            pooled.append(np.concatenate(parts, axis=-1)[0])
            states = runners['dt5'].run(self.t5.inputs(ids, mask))['states']
            texts.append(runners['context_adapter'].run({'states': states})['text'])
        return Prompt(_stacked(texts), jnp.asarray(tokens.t5_mask), _stacked(pooled))


@dataclasses.dataclass(frozen=True)
class FirstFrameHost:
    """The host's part of the first-frame model.

    Attributes:
      tokenizers: tokenizers of the two text towers.
      towers: embedding tables of the towers.
      embed: (timestep [B], pooled, sizes) -> embedding [B, E] of the UNet.
      scaling_factor: scaling factor of the image latents.
      size: height and width of the picture.
      latent_size: h, w, C.
    """

    tokenizers: Sequence[ClipTokenizer]
    towers: Sequence[text_graphs.ClipHost]
    embed: Callable[[Array, Array, Array], Array]
    scaling_factor: float
    size: tuple[int, int]
    latent_size: tuple[int, int, int]

    @classmethod
    def load(cls, options: ProgramOptions) -> FirstFrameHost:
        """Read the tables and the embedder of a checkpoint."""
        find = options.find
        unet = text_graphs.open_component(find(folders.FIRST_FRAME_UNET), UNet2DConditionModel)
        vae = text_graphs.open_component(find(folders.FIRST_FRAME_VAE), AutoencoderKL)
        params = read_float32(find(folders.FIRST_FRAME_UNET), *picture_graphs.UNET_HOST)
        height, width = first_frame.picture_size(*options.size)
        factor = vae.config.spatial_factor
        return cls(
            [ClipTokenizer.load(find(name)) for name in folders.FIRST_FRAME_TOKENIZERS],
            [
                text_graphs.ClipHost.load(find(name))
                for name in (folders.FIRST_FRAME_CLIP_L, folders.FIRST_FRAME_CLIP_G)
            ],
            partial(jax.jit(partial(unet.apply, method='embed')), {'params': params}),
            vae.config.scaling_factor,
            (height, width),
            (height // factor, width // factor, unet.config.in_channels),
        )

    def encode_prompt(self, runners: Runners, prompts: Sequence[str]) -> consistency_sampler.Condition:
        """Encode prompts for the UNet with two graphs."""
        towers = []
        for name, tokenizer, tower in zip(FIRST_FRAME, self.tokenizers, self.towers, strict=False):
            end = name == 'first_frame_clip_g'
            towers.append([runners[name].run(_tower_inputs(tower, row, end)) for row in tokenizer(prompts)])
        first, second = ([example['states'] for example in examples] for examples in towers)
        pooled = _stacked([example['pooled'][0] for example in towers[1]])
        # Only the penultimate state is read.
        outputs = [CLIPTextOutput(pooled, state, (state, state)) for state in (_stacked(first), _stacked(second))]
        return first_frame.make_condition(outputs[0], outputs[1], *self.size)

    def denoise(self, runners: Runners, x: Array, timestep: Array, condition: consistency_sampler.Condition) -> Array:
        """Predict the noise in latents with the UNet's graph."""
        embedding = np.asarray(self.embed(timestep, condition.pooled, condition.sizes), np.float32)
        noise = []
        for index in range(len(x)):
            one = slice(index, index + 1)
            feeds = {'latent': _host(x[one]), 'text': _host(condition.text[index]), 'embedding': embedding[one]}
            noise.append(runners['first_frame_unet'].run(feeds)['noise'][0])
        return _stacked(noise)

    def decode(self, runners: Runners, latents: Array) -> Array:
        """Decode latents to pictures with the decoder's graph."""
        run = runners['first_frame_decoder'].run
        return _stacked([run({'latent': _host(x[None] / self.scaling_factor)})['picture'][0] for x in latents])


def components(host: TextHost, runners: Runners, denoise: Denoiser, base: pipeline.Components) -> pipeline.Components:
    """Return the pipeline's components, each running graphs one example at a time.

    Args:
      denoise: the denoiser, for example a `GraphDenoiser`.
      base: components that provide the denoiser's sizes.
    """

    def encode_image(frames: Array) -> Array:
        outputs = [runners['video_encoder'].run({'picture': _host(frame)}) for frame in frames]
        return _stacked([np.concatenate([out['mean'], out['log_variance']], axis=-1) for out in outputs])

    return dataclasses.replace(
        base,
        encode_prompt=partial(host.encode_prompt, runners),
        encode_image=encode_image,
        denoise=denoise,
        decode_step=partial(_decode_step, runners),
        init_memories=host.vae.init_memories,
    )


def first_frame_model(host: FirstFrameHost, runners: Runners) -> first_frame.FirstFrameModel:
    """Return the first-frame model running graphs one example at a time."""
    return first_frame.FirstFrameModel(
        encode_prompt=partial(host.encode_prompt, runners),
        denoise=partial(host.denoise, runners),
        decode=partial(host.decode, runners),
        latent_size=host.latent_size,
    )


def upscaler(runners: Runners) -> Callable[[Array], Array]:
    """Return super-resolution of pictures [B, H, W, 3] in [0, 1], one graph call per picture."""
    run = lambda frame: runners['super_resolution'].run({'frame': _host(frame)[None]})['enlarged'][0]
    return lambda frames: _stacked([run(frame) for frame in frames])


def _decode_step(runners: Runners, latent: Array, memories: Sequence[Array]) -> tuple[Array, tuple[Array, ...]]:
    """Run one step of the streaming decoder, see `pipeline.Components`."""
    frames, following = [], []
    for index in range(latent.shape[0]):
        state = {f'memory_{number}': _host(memory[index : index + 1]) for number, memory in enumerate(memories)}
        outputs = runners['video_decoder'].run({'latent': _host(latent[index]), **state})
        frames.append(outputs['frames'])
        following.append([outputs[f'next_memory_{number}'][0] for number in range(len(memories))])
    return _stacked(frames), tuple(_stacked(parts) for parts in zip(*following, strict=True))


def _tower_inputs(tower: text_graphs.ClipHost, ids: np.ndarray, end: bool) -> Feeds:
    return {'embeddings': tower.embeddings(ids)} | ({'end': tower.end(ids)} if end else {})


def _stacked(parts: Sequence[np.ndarray]) -> Array:
    return jnp.asarray(np.stack(parts), jnp.float32)


def _host(array: Any) -> np.ndarray:
    return np.asarray(array, np.float32)
