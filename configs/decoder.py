"""Asymmetric decoder distillation: a small decoder on a frozen encoder (Neodragon, arXiv 2511.06055).

    python -m train.decoder --config=configs/decoder.py --config.decoder.start=VAE --config.data=CLIPS \
        --config.workdir=RUN --config.decoder.terms.lpips_weights=lpips_vgg.safetensors

VAE is the component folder of a video VAE: Pyramid-Flow's, the result of train.autoencoder, or the released one. CLIPS
is a dataset of one size, written by train.captioned_clips or train.moving_shapes. RUN/result gets `causal_video_vae` in
the released layout, with the encoder of VAE byte for byte: copy it into a checkpoint. Evaluations compare it with the
clips and with the native decoder; RUN/samples shows them side by side.

full (default): TinyAEHV, 0.010B parameters, cuts of 17 frames of 256x256, and the paper's terms: squared error and
LPIPS (train/vae/perceptual.py explains how to get its weights; without them the run prints a warning). Hardware: 8
accelerators with 16 GB; `--dry-run` needs neither data nor weights. Expected (paper): more than 29 dB on DAVIS after
350K clips. `decoder.features=()` continues from the small decoder in VAE; `decoder.native_weight=1` also learns from
the native decoder.

tiny: a small decoder on the autoencoder of configs/autoencoder.py:tiny and its scenes; any computer:

    python -m train.decoder --config=configs/decoder.py:tiny --config.workdir=RUN \
        --config.decoder.start=AUTOENCODER_RUN/result/pyramid_flow_vae

RUN/metrics.jsonl has the quality on held-out scenes, beside that of the native decoder.

shapes: the same for configs/autoencoder.py:shapes, with a tenth of its decoder's parameters.

Override any setting: `--config.decoder.terms.edges=0.5`. Run the same command again to resume.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from train.decoder.networks import DecoderConfig
from train.runtime.program import LoopConfig
from train.runtime.settings import defaults, preset_of
from train.vae.clips import ClipsConfig

FULL = {
    'data': '',  # folder of clips, or shapes:WORLD, of train/shapes/world.py
    'workdir': '',
    'seed': 0,
    'decoder': defaults(
        DecoderConfig,
        ema_decay=0.9995,
        terms={'square': 1.0, 'lpips': 1.0},
        memory={'blocks': True},
        optimizer={'learning_rate': 1e-4, 'warmup_steps': 1000},
    ),
    'clips': defaults(ClipsConfig, held_out=16),
    'loop': defaults(
        LoopConfig,
        steps=100_000,
        batch_size=32,
        mesh={'data': -1, 'fsdp': 1},
        checkpoint_every=2000,
        evaluate_every=5000,
    ),
}

TINY = {
    'data': 'shapes:cpu',
    'decoder': {
        'features': (32, 24, 16, 16),
        'terms': {'edges': 0.5, 'lpips': 0.0},
        'ema_decay': 0.99,
        'dtype': 'float32',
        'memory': {'blocks': False},
        'optimizer': {'learning_rate': 2e-3, 'warmup_steps': 20},
        'evaluation': {'batch': 8, 'videos': 4},
    },
    'clips': {'height': 64, 'width': 64, 'held_out': 8},
    'loop': {
        'steps': 400,
        'batch_size': 8,
        'checkpoint_every': 200,
        'log_every': 20,
        'evaluate_every': 200,
    },
}

# A tenth of the parameters of the native decoder in configs/autoencoder.py:shapes.
SHAPES = {
    'data': 'shapes:cpu',
    'decoder': {
        'features': (24, 20, 16, 16),
        'terms': {'absolute': 0.1, 'square': 1.0, 'edges': 0.2, 'lpips': 0.0},
        'ema_decay': 0.99,
        'dtype': 'float32',
        'flat': True,
        'memory': {'blocks': False},
        'optimizer': {'learning_rate': 3e-3, 'warmup_steps': 20, 'schedule': 'cosine', 'decay_steps': 3000},
        'evaluation': {'batch': 8, 'videos': 4},
    },
    'clips': {'height': 64, 'width': 64, 'held_out': 32},
    'loop': {
        'steps': 3000,
        'batch_size': 2,
        'checkpoint_every': 500,
        'log_every': 20,
        'evaluate_every': 500,
    },
}


def get_config(preset: str = 'full') -> ConfigDict:
    """Return the settings of a preset: full, tiny or shapes."""
    return preset_of('configs/decoder.py', FULL, {'tiny': (TINY,), 'shapes': (SHAPES,)}, preset)
