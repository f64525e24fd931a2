"""The first frame: drawn from the prompt, and encoded as a latent.

Legend: H W pixels, h w latent grid, C channels, L tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from neodragon_phone import noise
from neodragon_phone.errors import BundleError
from neodragon_phone.pictures import to_frame
from neodragon_phone.player import Player
from neodragon_phone.text import tower_inputs


def encode_picture(player: Player, frame: np.ndarray, seed: int) -> np.ndarray:
    """Return the normalized latent [h, w, C] of a frame [H, W, 3] in [-1, 1]: a sample of the encoder's posterior."""
    statistics = player.manifest['video']['normalization']
    with player.phase('first frame') as graphs:
        outputs = graphs['video_encoder']({'picture': frame[None]})
    mean, log_variance = outputs['mean'][0], outputs['log_variance'][0]
    low, high = (np.float32(limit) for limit in statistics['log_variance_range'])
    deviation = np.exp(np.clip(log_variance, low, high) / 2)
    latent = mean + deviation * noise.normals(seed, noise.POSTERIOR, 0, 0, mean.shape)
    return (latent - np.float32(statistics['first_shift'])) * np.float32(statistics['first_scale'])


def draw_frame(player: Player, prompt: str, seed: int) -> np.ndarray:
    """Return a first frame [H, W, 3] in [-1, 1], drawn from the prompt (modifier included)."""
    entry, bundle = player.manifest['first_frame'], player.bundle
    with player.phase('picture text') as graphs:
        feeds = {name: tower_inputs(bundle, tower, prompt) for name, tower in entry['towers'].items()}
        del feeds['first_frame_clip_l']['end']
        outputs = {name: graphs[name](feeds[name]) for name in feeds}
    text = np.concatenate([outputs[name]['states'] for name in ('first_frame_clip_l', 'first_frame_clip_g')], axis=-1)
    embeddings = _embeddings(player, entry, outputs['first_frame_clip_g']['pooled'])
    latent = _draw_latent(player, entry, text, embeddings, seed)
    with player.phase('picture decoding') as graphs:
        scaled = latent / np.float32(entry['scaling_factor'])
        pixels = graphs['first_frame_decoder']({'latent': scaled[None]})['picture'][0]
    if np.isnan(pixels).any():
        raise BundleError('the first frame has values that are not numbers; use --backend cpu, and report the chip.')
    picture = np.round(np.clip(pixels / 2 + np.float32(0.5), 0, 1) * 255).astype(np.uint8)
    video = player.manifest['video']
    return to_frame(picture, video['height'], video['width'])


def _embeddings(player: Player, entry: Any, pooled: np.ndarray) -> np.ndarray:
    """Return the UNet's embedding of each step, [S, E]."""
    tables = {name: np.asarray(player.bundle.table(table)) for name, table in entry['embedding'].items()}
    try:
        hidden = _silu(pooled.reshape(1, -1) @ tables['hidden_kernel'] + tables['hidden_bias'])
        embeddings = _silu(tables['step'] + hidden @ tables['output_kernel'])
        return embeddings.reshape(len(entry['steps']), -1)
    except ValueError:
        raise BundleError(
            'manifest.json: the tables of "first_frame.embedding" do not fit. Copy the bundle again.'
        ) from None


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _draw_latent(player: Player, entry: Any, text: np.ndarray, embeddings: np.ndarray, seed: int) -> np.ndarray:
    """Return the latent of the picture, [h, w, C], in steps of a consistency model (arXiv 2310.04378, equation 9)."""
    shape = tuple(entry[f'latent_{side}'] for side in ('height', 'width', 'channels'))
    x = noise.normals(seed, noise.PICTURE, 0, 0, shape)
    with player.phase('picture') as graphs:
        for number, (step, embedding) in enumerate(zip(entry['steps'], embeddings, strict=True)):
            feeds = {'latent': x[None], 'text': text, 'embedding': embedding[None]}
            predicted = graphs['first_frame_unet'](feeds)['noise'][0]
            number32 = {name: np.float32(step[name]) for name in ('signal', 'noise', 'keep', 'take')}
            clean = (x - number32['noise'] * predicted) / number32['signal']
            x = number32['take'] * clean + number32['keep'] * x
            if step['next'] is not None:
                more = noise.normals(seed, noise.PICTURE_STEP, number, 0, shape)
                x = np.float32(step['next']['signal']) * x + np.float32(step['next']['noise']) * more
            player.report(f'  picture step {number + 1} of {len(entry["steps"])}')
    return x
