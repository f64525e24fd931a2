"""Block pruning: a denoiser of 24 blocks becomes one of 18 (Neodragon, arXiv 2511.06055, block pruning).

First choose the blocks, then train what is left of the denoiser, twice:

    python -m train.prune select --denoiser FULL --data LATENTS --out CHOICE --remove 6
    python -m train.pruning --config=configs/pruning.py:stage1 --config.denoiser=FULL --config.keep=CHOICE/keep.json \
        --config.data=LATENTS --config.workdir=RUN1
    python -m train.pruning --config=configs/pruning.py:stage2 --config.denoiser=FULL --config.keep=CHOICE/keep.json \
        --config.start=RUN1/result/diffusion_transformer_320p_multistep_t2v --config.data=LATENTS --config.workdir=RUN2

FULL is the folder of a denoiser, such as RUN/result/pyramid_flow_dit of train.teacher; LATENTS a folder of
train.latents. Any keep list will do: --config.keep=0,1,2,4,5. The result is an ordinary, smaller denoiser, which
train.teacher_samples samples and train.dmd distils.

stage1 (the default): flow matching on data, 300 steps, after which the paper saw no more progress.
stage2: 60,000 steps of feature matching against the full denoiser, together with flow matching. The full and the
pruned denoiser, its average and its moments are 32 GB in float32, split over the mesh's fsdp axis: for 16 accelerators
with 16 GB or more. By the paper 2.028B parameters become 1.518B, and VBench goes from 80.31 to 80.21.

stage1-tiny, stage2-tiny: the same on the miniature of configs/teacher.py:tiny, on any computer.

stage1-shapes, stage2-shapes: what `train.benchmark` does with the denoiser of configs/teacher.py:shapes.

`--dry-run` prints shapes, shardings and bytes per device. The same command goes on where a run was stopped.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from neodragon_jax.base.errors import InputError
from train.runtime.optimizer import OptimizerConfig
from train.runtime.program import LoopConfig
from train.runtime.settings import defaults

PRESETS = ('stage1', 'stage2', 'stage1-tiny', 'stage2-tiny', 'stage1-shapes', 'stage2-shapes')


def get_config(preset: str = 'stage1') -> ConfigDict:
    """Return the settings; `preset` is what follows the colon of --config=configs/pruning.py:stage2."""
    preset = preset or 'stage1'
    if preset not in PRESETS:
        raise InputError(f'configs/pruning.py:{preset}: no such preset; use one of {", ".join(PRESETS)}.')
    stage = 2 if preset.startswith('stage2') else 1
    config = ConfigDict(
        {
            'denoiser': '',  # component folder of the full denoiser
            'keep': '',  # blocks, as 0,1,2,4, or the keep.json of train.prune
            'start': '',  # component folder of the pruned denoiser of stage 1; '' prunes the full one
            'data': '',  # folders of train.latents, separated by commas
            'weights': (),  # share of each folder; () gives equal ones
            'workdir': '',
            'seed': 0,
            'pruning': {
                'stage': stage,
                'mapping': 'simple',  # or 'next'
                'image_weight': 1.0,
                'text_weight': 1.0,
                'output_weight': 1.0,
                'data_weight': 1.0,
            },
            'flow': {
                'stages': 'one',  # per step; or 'all'
                'caption_dropout': 0.1,
                'corruption': 1 / 3,
                'ema_decay': 0.0 if stage == 1 else 0.999,
                'accumulate': 1,
                'dtype': 'bfloat16',
                'remat': 'full',
                'optimizer': defaults(OptimizerConfig, learning_rate=5e-5, warmup_steps=20 if stage == 1 else 1000),
                'evaluation': {
                    'examples': 64,
                    'batch': 64,
                    'samples': 16,
                    'steps': (10, 10, 10),
                    'first_steps': (20, 20, 20),
                    'guidance': 5.0,
                    'first_guidance': 7.0,
                    'decoder': '',  # component folder of a video VAE; '' writes latents only
                },
            },
            'loop': defaults(
                LoopConfig,
                steps=300 if stage == 1 else 60_000,
                batch_size=64,
                mesh={'data': 1, 'fsdp': -1, 'tensor': 1},
                checkpoint_every=100 if stage == 1 else 1000,
                log_every=10 if stage == 1 else 50,
                evaluate_every=100 if stage == 1 else 5000,
            ),
        }
    )
    if preset.endswith('tiny'):
        config.update(TINY)
    elif preset.endswith('shapes'):
        config.update(SHAPES)
        config.update(SHAPES_STAGES[stage - 1])
    return config


TINY = {
    'flow': {
        'stages': 'all',
        'dtype': 'float32',
        'remat': 'none',
        'optimizer': {'learning_rate': 1e-3, 'warmup_steps': 10},
        'evaluation': {
            'examples': 8,
            'batch': 8,
            'samples': 4,
            'steps': (2, 2, 2),
            'first_steps': (2, 2, 2),
            'guidance': 2.0,
            'first_guidance': 2.0,
        },
    },
    'loop': {
        'steps': 60,
        'batch_size': 16,
        'mesh': {'data': -1, 'fsdp': 1},
        'checkpoint_every': 30,
        'log_every': 10,
        'evaluate_every': 30,
    },
}

SHAPES = {
    'flow': {
        'dtype': 'float32',
        'remat': 'none',
        'evaluation': {'examples': 64, 'batch': 64, 'samples': 0},
    },
    'loop': {
        'batch_size': 32,
        'mesh': {'data': -1, 'fsdp': 1},
        'log_every': 50,
    },
}
SHAPES_STAGES = (
    {
        'flow': {'stages': 'all', 'optimizer': {'learning_rate': 5e-4, 'warmup_steps': 20}},
        'loop': {'steps': 200, 'checkpoint_every': 200, 'evaluate_every': 200},
    },
    {
        'flow': {
            'ema_decay': 0.998,
            'optimizer': {
                'kind': 'muon',
                'learning_rate': 4e-3,
                'warmup_steps': 50,
                'schedule': 'cosine',
                'decay_steps': 2500,
            },
        },
        'loop': {'steps': 2500, 'checkpoint_every': 500, 'evaluate_every': 500},
    },
)
