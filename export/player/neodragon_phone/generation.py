"""Prompt to video, phase by phase."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from neodragon_phone.denoiser import generate_latents
from neodragon_phone.errors import BundleError
from neodragon_phone.first_frame import draw_frame, encode_picture, read_frame
from neodragon_phone.frames import decode
from neodragon_phone.player import Player, snr_db
from neodragon_phone.text import encode_prompts


@dataclasses.dataclass(frozen=True)
class Request:
    """A video to make.

    Attributes:
      prompt: without modifier.
      seed: of all noise, in 0..2^64 - 1.
      image: file of the first frame, or the frame itself [H, W, 3] in [-1, 1]; None draws it, or generates all frames.
    """

    prompt: str
    seed: int = 0
    image: pathlib.Path | np.ndarray | None = None


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
    prompt = request.prompt + manifest['video']['prompt_modifier']
    guided = any(manifest['denoiser'][name] is not None for name in ('guidance', 'first_guidance'))
    prompts = encode_prompts(player, [prompt, *([manifest['video']['negative_prompt']] if guided else [])])
    frame = _first_frame(player, request, prompt)
    first = None if frame is None else encode_picture(player, frame, request.seed)
    latents = generate_latents(player, prompts, request.seed, first)
    return Video(latents, decode(player, latents))


def _first_frame(player: Player, request: Request, prompt: str) -> np.ndarray | None:
    """Return the first frame [H, W, 3] in [-1, 1], or None if the denoiser makes it."""
    manifest = player.manifest
    video = manifest['video']
    if request.image is not None:
        if not player.has('video_encoder'):
            raise BundleError('--image: this bundle has no video_encoder. Leave it out, or export with --image.')
        if isinstance(request.image, np.ndarray):
            return request.image
        return read_frame(request.image, video['height'], video['width'])
    if manifest['first_frame'] is not None:
        return draw_frame(player, prompt, request.seed)
    if manifest['denoiser']['first_unit'] > 0:
        raise BundleError('this bundle has no first-frame model; give a picture with --image.')
    return None


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
