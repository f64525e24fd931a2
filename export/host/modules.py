"""The graphs of a checkpoint for videos of one size, except the denoiser's graphs.

`phone_modules` returns the modules that run on the phone; graph_program.py puts graph runners into the pipeline.
Source: arXiv 2511.06055, section 4.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from export.graphs import pictures as picture_graphs
from export.graphs import text as text_graphs
from export.graphs.table import PhoneGraph
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.lists import comma_list
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.first_frame import picture_size
from neodragon_jax.generation.tokens import T5Tokenizer
from neodragon_jax.models.sdxl_vae import AutoencoderKL
from neodragon_jax.pyramid.sampler import Plan

Path = str | os.PathLike[str]

FIRST_FRAME = ('first_frame_clip_l', 'first_frame_clip_g', 'first_frame_unet', 'first_frame_decoder')


@dataclasses.dataclass(frozen=True)
class ProgramOptions:
    """The checkpoint, mode and video size that graphs are made for.

    Attributes:
      root: root folder of a checkpoint in the released layout.
      mode: 'hybrid' (a first frame starts the video) or 'monolithic'.
      plan: latent size, steps and guidance of the video.
      adapter: context adapter folder; None uses the mode's default.
      upscaler: folder of a QuickSRNet; None leaves super-resolution out (the release has no weights for it).
      first_frame: source of frame 0 if no image is given, one of `generation.defaults.FIRST_FRAMES`.
      images: whether images are given as first frames.
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
        """Whether the program contains the first-frame model."""
        return self.mode == 'hybrid' and self.first_frame == 'model'

    def find(self, name: str) -> pathlib.Path:
        """Return the folder of a component."""
        return checkpoint.component_folder(self.root, name)

    @property
    def text_tokens(self) -> int:
        """Number of tokens of a prompt in DT5."""
        return T5Tokenizer.load(pathlib.Path(self.root) / folders.T5_TOKENIZER).length

    @property
    def frames(self) -> int:
        """Number of video frames."""
        return 1 + pipeline.TEMPORAL_FACTOR * (self.plan.frames - 1)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the video in pixels."""
        return self.plan.height * pipeline.SPATIAL_FACTOR, self.plan.width * pipeline.SPATIAL_FACTOR


def phone_modules(options: ProgramOptions) -> dict[str, PhoneGraph]:
    """Return the modules of a checkpoint by name, without reading their parameters.

    Raises:
      InputError: a component is missing or of another kind.
    """
    find, (height, width), text_tokens = options.find, options.size, options.text_tokens
    grid = (options.plan.height, options.plan.width)
    adapter = options.adapter or find(folders.ADAPTER_FOLDERS[options.mode])
    modules = [
        text_graphs.clip_pooled('clip_l', find(folders.CLIP_L)),
        text_graphs.clip_pooled('clip_g', find(folders.CLIP_G)),
        text_graphs.dt5(find(folders.T5), text_tokens),
        text_graphs.context_adapter(adapter, text_tokens),
        picture_graphs.video_decoder(find(folders.VIDEO_VAE), *grid),
    ]
    if options.has_model:
        modules += _first_frame_modules(options)
    if options.has_model or options.images:
        modules.append(picture_graphs.video_encoder(find(folders.VIDEO_VAE), height, width))
    if options.upscaler is not None:
        modules.append(picture_graphs.super_resolution(options.upscaler, height, width))
    return {module.name: module for module in modules}


def _first_frame_modules(options: ProgramOptions) -> list[PhoneGraph]:
    """Return the text towers, the UNet and the decoder of the first-frame model."""
    find = options.find
    image_vae = text_graphs.open_component(find(folders.FIRST_FRAME_VAE), AutoencoderKL)
    latents = [side // image_vae.config.spatial_factor for side in picture_size(*options.size)]
    return [
        text_graphs.clip_states('first_frame_clip_l', find(folders.FIRST_FRAME_CLIP_L), pooled=False),
        text_graphs.clip_states('first_frame_clip_g', find(folders.FIRST_FRAME_CLIP_G), pooled=True),
        picture_graphs.first_frame_unet(find(folders.FIRST_FRAME_UNET), *latents),
        picture_graphs.first_frame_decoder(find(folders.FIRST_FRAME_VAE), *latents),
    ]


def select(names: str | None, available: Sequence[str]) -> list[str]:
    """Return the graphs that a list selects, in the order of `available`.

    Args:
      names: comma-separated names of graphs or of groups (`denoiser` selects all `denoiser_*`); None selects all.
      available: names of all graphs of the checkpoint.
    Raises:
      InputError: a name matches no graph, or the list is empty.
    """
    if names is None:
        return list(available)
    wanted: set[str] = set()
    for name in comma_list(names):
        found = [known for known in available if known == name or known.startswith(f'{name}_')]
        if not found:
            raise InputError(
                f'--graphs has {name!r}; use one or more of {", ".join(available)}, or a group such as "denoiser".'
            )
        wanted.update(found)
    if not wanted:
        raise InputError(f'--graphs is empty; use one or more of {", ".join(available)}.')
    return [name for name in available if name in wanted]
