"""Super-resolution: QuickSRNet for the end of the pipeline, 320x512 to 640x1024 (arXiv 2303.04336).

    python -m train.super_resolution --config=configs/super_resolution.py --config.data=FOLDER --config.workdir=RUN

FOLDER holds videos or pictures, at any depth, at least as large as a crop, in the formats of `train.captioned_clips`
(mp4, mov, mkv, webm, avi and others; png, jpg, webp). A step reads `loop.batch_size` files and cuts `crops.per_file`
crops from each. RUN/result gets `super_resolution`, for `--upscale` of the generation.

full (default): the medium variant, 2x, 50,000 parameters, 200,000 steps of 128 crops of 128x128. Hardware: one
accelerator; reading the files is the slower part. Expected: `loss` (mean absolute error, 0..1) begins above
`nearest_l1`, that of nearest-neighbor enlargement, and falls below it; `psnr` rises. The values depend on the data; the
published models were trained on DIV2K.

tiny: the small variant on crops of 32x32; a minute on a laptop, also on virtual devices:

    JAX_NUM_CPU_DEVICES=8 python -m train.super_resolution --config=configs/super_resolution.py:tiny \
        --config.data=FOLDER --config.workdir=RUN

Expected: `loss` below `nearest_l1`.

`--dry-run` prints shapes, shardings and bytes per device. Run the same command again to resume.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from train.runtime.program import LoopConfig
from train.runtime.settings import defaults, preset_of

FULL = {
    'data': '',  # folder of videos or pictures
    'workdir': '',
    'seed': 0,
    'super_resolution': {
        'variant': 'medium',  # or 'small', 'large'
        'scaling_factor': 2,  # or 3, 4
        'learning_rate': 5e-4,
        'decay_steps': 200_000,
        'clip_norm': 1.0,
    },
    'crops': {
        'size': 128,  # pixels, of the large pictures
        'per_file': 8,
        'rounds': 1000,
        'filter': 'lanczos',  # or 'bicubic'
    },
    'loop': defaults(
        LoopConfig,
        steps=200_000,
        batch_size=16,  # files
        checkpoint_every=5000,
        log_every=100,
    ),
}

TINY = {
    'super_resolution': {'variant': 'small', 'learning_rate': 2e-3, 'decay_steps': 0},
    'crops': {'size': 32},
    'loop': {'steps': 400, 'batch_size': 8, 'log_every': 20, 'checkpoint_every': 200},
}


def get_config(preset: str = 'full') -> ConfigDict:
    """Return the settings of a preset: full or tiny."""
    return preset_of('configs/super_resolution.py', FULL, {'tiny': (TINY,)}, preset)
