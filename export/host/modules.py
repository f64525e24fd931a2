"""All graphs but the denoiser's, for a checkpoint and a plan; and the host's half of the program around them.

`phone_modules` lists what runs on the phone. `Host` keeps what does not: tokenizers, token tables, the UNet's embedder.
`components` and `first_frame_model` put graph runners of any kind (JAX, ONNX Runtime, the HTP simulator) into the
places that the pipeline has for its modules, so that every graph is tested inside the real program.

Legend: B batch, F video frames, H W pixels, h w latent grid, C channels, L text tokens.
Source: arXiv 2511.06055, section 4.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
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
from export.graphs.table import Feeds, Module
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders as component_folders
from neodragon_jax.generation import first_frame, pipeline
from neodragon_jax.generation.tokens import ClipTokenizer, T5Tokenizer, Tokenizers
from neodragon_jax.models.clip import CLIPTextOutput
from neodragon_jax.models.sdxl_unet import UNet2DConditionModel
from neodragon_jax.models.sdxl_vae import AutoencoderKL
from neodragon_jax.models.vae import VideoVAE
from neodragon_jax.pyramid.sampler import Denoiser, Plan, Prompt

Path = str | os.PathLike[str]
Runners = Mapping[str, GraphRunner]

FIRST_FRAME = ('first_frame_clip_l', 'first_frame_clip_g', 'first_frame_unet', 'first_frame_decoder')
# The first frame is drawn at twice the video's size.
PICTURE_SCALE = 2


@dataclasses.dataclass(frozen=True)
class Source:
    """Where modules come from, and for which videos.

    Attributes:
      root: checkpoint in the released layout.
      mode: 'hybrid' or 'monolithic'; the first has a first frame.
      plan: sizes of the video.
      adapter: context adapter folder to use instead of the mode's own.
      upscaler: folder of a QuickSRNet; None leaves super-resolution out, which the release has no weights for.
      first_frame: who makes frame 0 where none is given, one of `generation.FIRST_FRAMES`.
      images: whether first frames are given.
    """

    root: Path
    mode: str
    plan: Plan
    adapter: Path | None = None
    upscaler: Path | None = None
    first_frame: str = 'model'
    images: bool = False

    @property
    def has_model(self) -> bool:
        """Whether the first-frame model belongs to the program."""
        return self.mode == 'hybrid' and self.first_frame == 'model'

    def find(self, name: str) -> pathlib.Path:
        """Return the folder of a component."""
        return checkpoint.component_folder(self.root, name)

    @property
    def text_tokens(self) -> int:
        """L, the tokens of a prompt for DT5."""
        return T5Tokenizer.load(pathlib.Path(self.root) / component_folders.T5_TOKENIZER).length

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the video in pixels."""
        return self.plan.height * pipeline.SPATIAL_FACTOR, self.plan.width * pipeline.SPATIAL_FACTOR


def phone_modules(source: Source) -> dict[str, Module]:
    """Return the modules of a checkpoint by name; their parameters are not read yet.

    Raises:
      InputError: a component is missing or of another kind.
    """
    find, (height, width), text_tokens = source.find, source.size, source.text_tokens
    grid = (source.plan.height, source.plan.width)
    adapter = source.adapter or find(component_folders.ADAPTER_FOLDERS[source.mode])
    modules = [
        text_graphs.clip_pooled('clip_l', find(component_folders.CLIP_L)),
        text_graphs.clip_pooled('clip_g', find(component_folders.CLIP_G)),
        text_graphs.dt5(find(component_folders.T5), text_tokens),
        text_graphs.context_adapter(adapter, text_tokens),
        picture_graphs.video_decoder(find(component_folders.VIDEO_VAE), *grid),
    ]
    if source.has_model:
        image_vae = text_graphs.open_component(find(component_folders.FIRST_FRAME_VAE), AutoencoderKL)
        latents = [PICTURE_SCALE * size // image_vae.config.spatial_factor for size in source.size]
        modules += [
            text_graphs.clip_states('first_frame_clip_l', find(component_folders.FIRST_FRAME_CLIP_L), pooled=False),
            text_graphs.clip_states('first_frame_clip_g', find(component_folders.FIRST_FRAME_CLIP_G), pooled=True),
            picture_graphs.first_frame_unet(find(component_folders.FIRST_FRAME_UNET), *latents),
            picture_graphs.first_frame_decoder(find(component_folders.FIRST_FRAME_VAE), *latents),
        ]
    if source.mode == 'hybrid' and (source.has_model or source.images):
        modules.append(picture_graphs.video_encoder(find(component_folders.VIDEO_VAE), height, width))
    if source.upscaler is not None:
        modules.append(picture_graphs.super_resolution(source.upscaler, height, width))
    return {module.name: module for module in modules}


@dataclasses.dataclass(frozen=True)
class Host:
    """The host's half of the text encoders.

    Attributes:
      tokenizers: of the video's three text encoders.
      clip_l, clip_g, t5: their tables.
      vae: the video VAE's module, for the shapes of its decoder's memories.
    """

    tokenizers: Tokenizers
    clip_l: text_graphs.ClipHost
    clip_g: text_graphs.ClipHost
    t5: text_graphs.T5Host
    vae: VideoVAE

    @classmethod
    def load(cls, source: Source) -> Host:
        """Read the tables of a checkpoint."""
        return cls(
            Tokenizers.load(source.root),
            text_graphs.ClipHost.load(source.find(component_folders.CLIP_L)),
            text_graphs.ClipHost.load(source.find(component_folders.CLIP_G)),
            text_graphs.T5Host.load(source.find(component_folders.T5)),
            text_graphs.open_component(source.find(component_folders.VIDEO_VAE), VideoVAE),
        )

    def encode_prompt(self, runners: Runners, prompts: Sequence[str]) -> Prompt:
        """Return what the denoiser knows of prompts, from four graphs."""
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
    """The host's half of the first-frame model.

    Attributes:
      tokenizers: of its two text towers.
      towers: their tables.
      embed: (timestep [B], pooled, sizes) -> embedding [B, E] of the UNet.
      scaling_factor: of the image latents.
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
    def load(cls, source: Source) -> FirstFrameHost:
        """Read the tables and the embedder of a checkpoint."""
        find = source.find
        unet = text_graphs.open_component(find(component_folders.FIRST_FRAME_UNET), UNet2DConditionModel)
        vae = text_graphs.open_component(find(component_folders.FIRST_FRAME_VAE), AutoencoderKL)
        params = read_float32(find(component_folders.FIRST_FRAME_UNET), *picture_graphs.UNET_HOST)
        height, width = (PICTURE_SCALE * size for size in source.size)
        factor = vae.config.spatial_factor
        return cls(
            [ClipTokenizer.load(find(name)) for name in component_folders.FIRST_FRAME_TOKENIZERS],
            [
                text_graphs.ClipHost.load(find(name))
                for name in (component_folders.FIRST_FRAME_CLIP_L, component_folders.FIRST_FRAME_CLIP_G)
            ],
            partial(jax.jit(partial(unet.apply, method='embed')), {'params': params}),
            vae.config.scaling_factor,
            (height, width),
            (height // factor, width // factor, unet.config.in_channels),
        )

    def encode_prompt(self, runners: Runners, prompts: Sequence[str]) -> first_frame.Condition:
        """Return what the UNet knows of prompts, from two graphs."""
        towers = []
        for name, tokenizer, tower in zip(FIRST_FRAME, self.tokenizers, self.towers, strict=False):
            end = name == 'first_frame_clip_g'
            towers.append([runners[name].run(_tower_inputs(tower, row, end)) for row in tokenizer(prompts)])
        first, second = ([example['states'] for example in examples] for examples in towers)
        pooled = _stacked([example['pooled'][0] for example in towers[1]])
        # Of the states, the one before the last is read.
        outputs = [CLIPTextOutput(pooled, state, (state, state)) for state in (_stacked(first), _stacked(second))]
        return first_frame.make_condition(outputs[0], outputs[1], *self.size)

    def denoise(self, runners: Runners, x: Array, timestep: Array, condition: first_frame.Condition) -> Array:
        """Return the noise in latents, from the UNet's graph."""
        embedding = np.asarray(self.embed(timestep, condition.pooled, condition.sizes), np.float32)
        noise = []
        for index in range(len(x)):
            one = slice(index, index + 1)
            feeds = {'latent': _host(x[one]), 'text': _host(condition.text[index]), 'embedding': embedding[one]}
            noise.append(runners['first_frame_unet'].run(feeds)['noise'][0])
        return _stacked(noise)

    def decode(self, runners: Runners, latents: Array) -> Array:
        """Return pictures of latents, from the decoder's graph."""
        run = runners['first_frame_decoder'].run
        return _stacked([run({'latent': _host(x[None] / self.scaling_factor)})['picture'][0] for x in latents])


def components(host: Host, runners: Runners, denoise: Denoiser, base: pipeline.Components) -> pipeline.Components:
    """Return the program's modules as graphs, one example at a time.

    Args:
      denoise: the denoiser, such as a `runtime.GraphDenoiser`.
      base: where the denoiser's sizes come from.
    """

    def encode_image(frames: Array) -> Array:
        outputs = [runners['video_encoder'].run({'picture': _host(frame)}) for frame in frames]
        moments = [np.concatenate([out['mean'], out['log_variance']], axis=-1) for out in outputs]
        return _stacked(moments)

    return dataclasses.replace(
        base,
        encode_prompt=partial(host.encode_prompt, runners),
        encode_image=encode_image,
        denoise=denoise,
        decode_step=partial(_decode_step, runners),
        init_memories=host.vae.init_memories,
    )


def first_frame_model(host: FirstFrameHost, runners: Runners) -> first_frame.FirstFrameModel:
    """Return the first-frame model as graphs, one example at a time."""
    return first_frame.FirstFrameModel(
        encode_prompt=partial(host.encode_prompt, runners),
        denoise=partial(host.denoise, runners),
        decode=partial(host.decode, runners),
        latent_size=host.latent_size,
    )


def upscaler(runners: Runners) -> Callable[[Array], Array]:
    """Return super-resolution as a function of pictures [B, H, W, 3] in [0, 1], one at a time."""
    run = lambda frame: runners['super_resolution'].run({'frame': _host(frame)[None]})['enlarged'][0]
    return lambda frames: _stacked([run(frame) for frame in frames])


def select(names: str | None, available: Sequence[str]) -> list[str]:
    """Return the graphs that a comma-separated list of names or of their beginnings asks for, in the table's order.

    Raises:
      InputError: nothing is called like that.
    """
    if names is None:
        return list(available)
    wanted: set[str] = set()
    for name in filter(None, (part.strip() for part in names.split(','))):
        found = [known for known in available if known == name or known.startswith(f'{name}_')]
        if not found:
            raise InputError(f'--graphs has {name!r}; use some of {", ".join(available)}, or beginnings of them.')
        wanted.update(found)
    if not wanted:
        raise InputError(f'--graphs is empty; use some of {", ".join(available)}.')
    return [name for name in available if name in wanted]


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
