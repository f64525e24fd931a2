"""A video autoencoder from random parameters: causal encoder and native decoder (Pyramid-Flow, arXiv 2410.05954).

    python -m train.autoencoder --config=configs/autoencoder.py --config.data=CLIPS --config.workdir=RUN \
        --config.autoencoder.terms.lpips_weights=lpips_vgg.safetensors

CLIPS is a dataset of one size, written by train.captioned_clips or train.moving_shapes. RUN/result gets
`pyramid_flow_vae`, in Pyramid-Flow's layout and with latents as `neodragon_jax.models.vae.normalize` expects them, and
`autoencoder.json` with the measured moments of the latents. train/vae/perceptual.py explains how to get the LPIPS
weights; without them the run prints a warning, and `autoencoder.terms.edges` is the best replacement.

full (default): the released sizes, 0.336B parameters, cuts of 17 frames of 256x256. Hardware: 8 accelerators with
40 GB; `--dry-run` needs no data. With `autoencoder.memory.window=16` memory hardly grows with the number of frames.
`autoencoder.start=FOLDER` continues from a trained autoencoder, such as Pyramid-Flow's.

tiny: a small autoencoder on scenes that are drawn during training; any computer:

    python -m train.autoencoder --config=configs/autoencoder.py:tiny --config.workdir=RUN

RUN/metrics.jsonl has the quality on held-out scenes, every 200 steps; RUN/samples shows them.

shapes: the latents of `train.benchmark`; 0.5 s a step on one CPU core. Change `loop.steps` and
`autoencoder.optimizer.decay_steps` together. Evaluations also report the attributes that can be read from the
reconstructions, such as `shape_right` and `mismatch`:

    python -m train.autoencoder --config=configs/autoencoder.py:shapes --config.workdir=RUN

Override any setting: `--config.autoencoder.kl=1e-5`. Run the same command again to resume.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from train.autoencoder.program import AutoencoderConfig
from train.runtime.program import LoopConfig
from train.runtime.settings import defaults, preset_of
from train.vae.clips import ClipsConfig

FULL = {
    'data': '',  # folder of clips, or shapes:WORLD, of train/shapes/world.py
    'workdir': '',
    'seed': 0,
    'autoencoder': defaults(
        AutoencoderConfig,
        ema_decay=0.9995,
        terms={'absolute': 1.0, 'lpips': 1.0},
        memory={'blocks': True},
        optimizer={'learning_rate': 1e-4, 'warmup_steps': 1000},
    ),
    'clips': defaults(ClipsConfig, held_out=16),
    'loop': defaults(
        LoopConfig,
        steps=200_000,
        batch_size=32,
        mesh={'data': 1, 'fsdp': -1},
        checkpoint_every=2000,
        evaluate_every=5000,
    ),
}

TINY = {
    'data': 'shapes:cpu',
    'autoencoder': {
        'sizes': {
            'encoder_block_out_channels': (8, 16, 32, 32),
            'encoder_layers_per_block': (1, 1, 1, 1),
            'encoder_norm_num_groups': 4,
            'decoder_block_out_channels': (8, 8, 16, 32),
            'decoder_layers_per_block': (1, 1, 1, 1),
            'decoder_norm_num_groups': 4,
        },
        'terms': {'edges': 0.5, 'lpips': 0.0},
        'statistics': 16,
        'ema_decay': 0.99,
        'dtype': 'float32',
        'memory': {'blocks': False},
        'optimizer': {'learning_rate': 3e-3, 'warmup_steps': 20},
        'evaluation': {'batch': 8, 'videos': 4},
    },
    'clips': {'height': 64, 'width': 64, 'held_out': 8},
    'loop': {
        'steps': 400,
        'batch_size': 8,
        'mesh': {'data': -1, 'fsdp': 1},
        'checkpoint_every': 200,
        'log_every': 20,
        'evaluate_every': 200,
    },
}

# High resolutions have few channels: only three convolutions run at full resolution.
SHAPES = {
    'data': 'shapes:cpu',
    'autoencoder': {
        'sizes': {
            'encoder_block_out_channels': (8, 24, 64, 64),
            'encoder_layers_per_block': (0, 1, 1, 1),
            'encoder_norm_num_groups': 1,
            'decoder_block_out_channels': (8, 32, 48, 64),
            'decoder_layers_per_block': (1, 1, 1, 1),
            'decoder_spatial_up_sample': (False, True, True, True),
            'decoder_temporal_up_sample': (True, True, False, True),
            'decoder_norm_num_groups': 1,
        },
        'terms': {'absolute': 0.1, 'square': 1.0, 'edges': 0.2, 'lpips': 0.0},
        'kl': 1e-4,
        'statistics': 64,
        'ema_decay': 0.99,
        'dtype': 'float32',
        'flat': True,
        'memory': {'blocks': False},
        'optimizer': {'learning_rate': 5e-4, 'warmup_steps': 20, 'schedule': 'cosine', 'decay_steps': 1500},
        'evaluation': {'batch': 8, 'videos': 4},
    },
    'clips': {'height': 64, 'width': 64, 'held_out': 32},
    'loop': {
        'steps': 1500,
        'batch_size': 2,
        'mesh': {'data': -1, 'fsdp': 1},
        'checkpoint_every': 500,
        'log_every': 20,
        'evaluate_every': 500,
    },
}


def get_config(preset: str = 'full') -> ConfigDict:
    """Return the settings of a preset: full, tiny or shapes."""
    return preset_of('configs/autoencoder.py', FULL, {'tiny': (TINY,), 'shapes': (SHAPES,)}, preset)
