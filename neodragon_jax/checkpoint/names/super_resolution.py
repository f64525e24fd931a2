"""Rename table of QuickSRNet: the state dict of its published PyTorch checkpoints.

The published files are pickles (`*.pth.tar`, the tensors under `state_dict`); this project reads the same state dict
stored as safetensors.
"""

from __future__ import annotations

from neodragon_jax.checkpoint.names.convert import CONV2D, Entry, dense
from neodragon_jax.config.super_resolution import SuperResolutionConfig


def super_resolution_names(config: SuperResolutionConfig) -> list[Entry]:
    """Return every published tensor of QuickSRNet with its path in the Flax tree."""
    entries = []
    for index in range(config.num_intermediate_layers + 1):  # The odd numbers are clipped ReLUs.
        entries += dense(f'cnn.{2 * index}', (f'conv_{index}',), weight=CONV2D)
    entries += dense('conv_last', ('conv_last',), weight=CONV2D)
    return entries + dense('anchor.net', ('anchor',), weight=CONV2D) * config.use_ito_connection
