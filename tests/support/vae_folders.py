"""Released video autoencoders of the tests: the golden one and that of the miniature checkpoint."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import load_file

from neodragon_jax.config.neodragon import VideoVAEConfig
from support.goldens import GOLDENS, TINY_CHECKPOINT

FOLDERS = {
    'golden': (GOLDENS / 'video_vae', 'model.safetensors'),
    'tiny': (TINY_CHECKPOINT / 'causal_video_vae', 'diffusion_pytorch_model.safetensors'),
}


def read(name: str) -> tuple[VideoVAEConfig, dict[str, np.ndarray]]:
    """Return a folder's config and its released tensors."""
    folder, file = FOLDERS[name]
    config = VideoVAEConfig.from_json(json.loads((folder / 'config.json').read_text()), str(folder))
    return config, load_file(folder / file)
