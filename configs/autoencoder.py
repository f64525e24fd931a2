"""A video autoencoder from nothing: causal encoder and native decoder (Pyramid-Flow, arXiv 2410.05954).

    python -m train.autoencoder --config=configs/autoencoder.py --config.data=CLIPS --config.workdir=RUN \
        --config.autoencoder.terms.lpips_weights=lpips_vgg.safetensors

CLIPS is a dataset of one size by train.captioned_clips or train.moving_shapes. RUN/result gets `pyramid_flow_vae`, in
Pyramid-Flow's layout, with latents as `neodragon_jax.models.vae.normalize` expects them, and `autoencoder.json`, which
tells how close they are. train/vae/perceptual.py tells how to get the weights of LPIPS; without them the run says so,
and `autoencoder.terms.edges` is the next best.

full (the default): the released sizes, 0.336B parameters, on cuts of 17 frames of 256x256. For 8 accelerators with
40 GB or more; look at `--dry-run` first, which needs no data. For longer clips set `autoencoder.memory.window=16`, with
which memory hardly grows with the frames. To go on from Pyramid-Flow's own: `autoencoder.start=FOLDER`.

tiny: a small one on scenes of train.moving_shapes that are drawn when they are needed; any computer:

    python -m train.autoencoder --config=configs/autoencoder.py:tiny --config.workdir=RUN

RUN/metrics.jsonl has the quality on scenes that were held out, every 200 steps; RUN/samples shows them.

shapes: the latents of `train.benchmark`, for a CPU: half a second a step on one core. Change `loop.steps` and
`autoencoder.optimizer.decay_steps` together:

    python -m train.autoencoder --config=configs/autoencoder.py:shapes --config.workdir=RUN

Evaluations also tell which attributes can be read from the reconstructions, such as `shape_right` and `mismatch`.

Any setting: `--config.autoencoder.kl=1e-5`. The same command goes on where a run was stopped.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from neodragon_jax.base.errors import InputError
from train.autoencoder.program import AutoencoderConfig
from train.runtime.program import LoopConfig
from train.runtime.settings import defaults
from train.vae.clips import ClipsConfig


def get_config(preset: str = 'full') -> ConfigDict:
    """Return the settings; `preset` is what follows the colon of --config=configs/autoencoder.py:tiny."""
    if preset not in ('', 'full', 'tiny', 'shapes'):
        raise InputError(f'configs/autoencoder.py:{preset}: no such preset; use full, shapes or tiny.')
    config = ConfigDict(
        {
            'data': '',  # folder of clips, or shapes:cpu, shapes:gpu
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
    )
    if preset == 'tiny':
        config.update(TINY)
    if preset == 'shapes':
        config.update(SHAPES)
    return config


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

# Channels are few where pixels are many: at the full resolution are three convolutions only.
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
