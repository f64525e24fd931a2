"""Prompt to video, phase by phase."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from neodragon_phone.denoiser import generate_latents
from neodragon_phone.errors import BundleError
from neodragon_phone.first_frame import draw_frame, encode_picture
from neodragon_phone.frames import decode
from neodragon_phone.manifest import Manifest
from neodragon_phone.noise import check_seed
from neodragon_phone.pictures import read_frame
from neodragon_phone.player import Player, snr_db
from neodragon_phone.prompts import clean
from neodragon_phone.text import encode_prompts


@dataclasses.dataclass(frozen=True)
class Request:
    """A video to make.

    Raises:
      BundleError: the seed is out of range, or the prompt is empty or damaged.

    Attributes:
      prompt: without modifier; it is cleaned, see `prompts.clean`.
      seed: of all noise, in 0..2^64 - 1.
      image: file of the first frame, or the frame itself [H, W, 3] in [-1, 1]; None draws it, or generates all frames.
    """

    prompt: str
    seed: int = 0
    image: pathlib.Path | np.ndarray | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        object.__setattr__(self, 'prompt', clean(self.prompt))


@dataclasses.dataclass(frozen=True)
class Video:
    """A finished video: normalized latents [T, h, w, C], and frames as bytes [F, H, W, 3]."""

    latents: np.ndarray
    frames: np.ndarray


def generate(player: Player, request: Request) -> Video:
    """Make a video.

    Raises:
      BundleError: the bundle cannot make such a video, or a graph fails.
    """
    manifest = player.manifest
    frame = given_frame(manifest, request.image)
    prompt = request.prompt + manifest['video']['prompt_modifier']
    guided = any(manifest['denoiser'][name] is not None for name in ('guidance', 'first_guidance'))
    prompts = encode_prompts(player, [prompt, *([manifest['video']['negative_prompt']] if guided else [])])
    if frame is None and manifest['first_frame'] is not None:
        frame = draw_frame(player, prompt, request.seed)
    first = None if frame is None else encode_picture(player, frame, request.seed)
    latents = generate_latents(player, prompts, request.seed, first)
    return Video(latents, decode(player, latents))


def given_frame(manifest: Manifest, image: pathlib.Path | np.ndarray | None) -> np.ndarray | None:
    """Return the picture of a request as a frame [H, W, 3] in [-1, 1], in the size of a bundle's video; None if none.

    Raises:
      BundleError: the file is not a picture, the bundle takes none, or it needs one that is not given.
    """
    video = manifest['video']
    if image is None:
        if manifest['first_frame'] is None and manifest['denoiser']['first_unit'] > 0:
            raise BundleError('this bundle has no first-frame model; give a picture with --image.')
        return None
    if 'video_encoder' not in manifest['graphs']:
        raise BundleError('--image: this bundle has no video_encoder. Leave it out, or export with --image.')
    return image if isinstance(image, np.ndarray) else read_frame(image, video['height'], video['width'])


def check_video(player: Player) -> float:
    """Make the recorded video again; return the ratio of its last latent frame, in dB.

    Raises:
      BundleError: the ratio is below the recorded minimum.
    """
    entry = player.manifest['vectors']['video']
    image = None if entry['image'] is None else np.asarray(player.bundle.table(entry['image']))
    latents = generate(player, Request(entry['prompt'], entry['seed'], image)).latents
    reached = snr_db(player.bundle.recorded_latents()[-1], latents[-1])
    minimum = entry.get('minimum_db')
    if minimum is not None and not reached >= minimum:
        raise BundleError(
            f'the recorded video comes out at {reached:.1f} dB, not {minimum:.1f}: this runtime or chip computes '
            'something else. Update the runtime, or use --backend cpu.'
        )
    return reached
