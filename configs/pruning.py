"""Block pruning: a denoiser of 24 blocks becomes one of 18 (Neodragon, arXiv 2511.06055, section on block pruning).

Choose the blocks, then train the pruned denoiser in two stages:

    python -m train.prune select --denoiser FULL --data LATENTS --out CHOICE --remove 6
    python -m train.pruning --config=configs/pruning.py:stage1 --config.denoiser=FULL --config.keep=CHOICE/keep.json \
        --config.data=LATENTS --config.workdir=RUN1
    python -m train.pruning --config=configs/pruning.py:stage2 --config.denoiser=FULL --config.keep=CHOICE/keep.json \
        --config.start=RUN1/result/diffusion_transformer_320p_multistep_t2v --config.data=LATENTS --config.workdir=RUN2

FULL is the folder of a denoiser, such as RUN/result/pyramid_flow_dit of train.teacher; LATENTS is a folder of
train.latents. Other keep lists work as well: --config.keep=0,1,2,4,5. The result is an ordinary, smaller denoiser,
which train.teacher_samples samples and train.dmd distills.

stage1 (default): flow matching on data, 300 steps, after which the paper saw no further progress.

stage2: 60,000 steps of feature matching against the full denoiser, together with flow matching. The two denoisers, the
average and the moments are 32 GB in float32, split over the mesh's fsdp axis. Hardware: 16 accelerators with 16 GB.
Expected (paper): 2.028B parameters become 1.518B, and VBench goes from 80.31 to 80.21.

stage1-tiny, stage2-tiny: the same on the miniature of configs/teacher.py:tiny; any computer.

stage1-shapes, stage2-shapes: those of `train.benchmark`, on the denoiser of configs/teacher.py:shapes.

`--dry-run` prints shapes, shardings and bytes per device. Run the same command again to resume.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.teacher import TINY_FLOW
from train.pruning.config import PruningConfig
from train.runtime.program import LoopConfig
from train.runtime.settings import defaults, preset_of
from train.teacher.config import TeacherConfig

FULL = {
    'denoiser': '',  # component folder of the full denoiser
    'keep': '',  # blocks, as 0,1,2,4, or the keep.json of train.prune
    'start': '',  # component folder of the pruned denoiser of stage 1; '' prunes the full one
    'data': '',  # folders of train.latents, separated by commas
    'weights': (),  # share of each folder; () gives equal ones
    'workdir': '',
    'seed': 0,
    'pruning': defaults(PruningConfig, stage=1),
    'flow': defaults(
        TeacherConfig,
        *('sizes', 'context_embedder', 'start'),  # those of the denoiser
        optimizer={'learning_rate': 5e-5, 'warmup_steps': 20},
        evaluation={'batch': 64, 'samples': 16},
    ),
    'loop': defaults(
        LoopConfig,
        steps=300,
        batch_size=64,
        mesh={'data': 1, 'fsdp': -1},
        checkpoint_every=100,
        log_every=10,
        evaluate_every=100,
    ),
    # Data shape for --dry-run without data: latents of 49 frames of 320x512.
    'blank_sample': {'frames': 7, 'height': 40, 'width': 64, 'text_tokens': 128},
}

STAGE2 = {
    'pruning': {'stage': 2},
    'flow': {'ema_decay': 0.999, 'optimizer': {'warmup_steps': 1000}},
    'loop': {'steps': 60_000, 'checkpoint_every': 1000, 'log_every': 50, 'evaluate_every': 5000},
}

TINY = {
    'flow': TINY_FLOW,
    'loop': {
        'steps': 60,
        'batch_size': 16,
        'mesh': {'data': -1, 'fsdp': 1},
        'checkpoint_every': 30,
        'log_every': 10,
        'evaluate_every': 30,
    },
    'blank_sample': {'frames': 3, 'height': 8, 'width': 8},
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
    'blank_sample': {'frames': 3, 'height': 8, 'width': 8, 'text_tokens': 16},
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

# Each preset changes the one before it.
PRESETS = {
    'stage1': (),
    'stage2': (STAGE2,),
    'stage1-tiny': (TINY,),
    'stage2-tiny': (STAGE2, TINY),
    'stage1-shapes': (SHAPES, SHAPES_STAGES[0]),
    'stage2-shapes': (STAGE2, SHAPES, SHAPES_STAGES[1]),
}


def get_config(preset: str = 'stage1') -> ConfigDict:
    """Return the settings of a preset: one of PRESETS."""
    return preset_of('configs/pruning.py', FULL, PRESETS, preset, first='stage1')
