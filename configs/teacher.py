"""The teacher: autoregressive pyramidal flow matching on latents (Pyramid-Flow, arXiv 2410.05954).

    python -m train.teacher --config=configs/teacher.py --config.data=LATENTS --config.workdir=RUN

LATENTS is a folder of train.latents with latents of videos, T5-XXL's states (--text t5), pooled vectors, and those of
the empty caption; or several folders, such as videos and pictures, with their shares:

    --config.data=VIDEOS/320x512,PICTURES/320x512 --config.weights="(3.0, 1.0)"

RUN/result gets a denoiser in the released layout, the input of train.teacher_samples and train.dmd. With a context
embedder it also gets one in Pyramid-Flow's layout.

full (default): 24 blocks of width 1536 with the context embedder of T5-XXL's states, 2.03B parameters, and the paper's
recipe: AdamW 0.9 / 0.95, weight decay 1e-4, rate 5e-5 after 1,000 steps of warm-up, gradients clipped at 1. Parameters,
average and moments are 32 GB in float32, split over the mesh's fsdp axis. Hardware: 16 accelerators with 16 GB. A step
has 1.4 PFLOP on average, 2.8 at stage 2; `--dry-run` needs no data.

tiny: two blocks of width 64 on latents [3, 8, 8, 16], with text states of the test suite's miniature checkpoint; any
computer, two minutes on two cores, mostly compilation:

    python -m train.moving_shapes --out VIDEOS --videos --count 96 --frames 17 --height 64 --width 64
    python -m train.captioned_clips --videos VIDEOS --captions VIDEOS/captions.csv --out CLIPS --frames 17 --sizes 64x64
    python -m train.latents --checkpoint tests/goldens/tiny_checkpoint --clips CLIPS --out LATENTS --dtype float32
    python -m train.teacher --config=configs/teacher.py:tiny --config.data=LATENTS/64x64 --config.workdir=RUN

Expected in RUN/metrics.jsonl: `loss` from 0.25 (the first 20 steps) to 0.13 (step 200), at stages 0, 1 and 2 from 0.10,
0.23 and 0.40 to 0.008, 0.05 and 0.32; `eval/validation` 0.135. The VAE is random, so its videos show nothing.

shapes: the denoiser of `train.benchmark` on moving shapes: four blocks of width 96, 1.5M parameters, T5 states of 16
tokens; with Muon, 0.2 s a step on one core.

shapes-stills, shapes-continued: those of `train.benchmark --start`, which continue from a checkpoint's denoiser
(`--config.teacher.start`) on its text states: on single frames, and on clips, half of whose examples are of unit 0. For
clips of other than three latent frames, give `--config.teacher.unit_weights`.

Override any setting: `--config.teacher.optimizer.learning_rate=1e-4`. Run the same command again to resume.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from train.runtime.optimizer import OptimizerConfig
from train.runtime.program import LoopConfig
from train.runtime.settings import defaults, preset_of

FULL = {
    'data': '',  # folders of train.latents, separated by commas
    'weights': (),  # share of each folder; () gives equal ones
    'workdir': '',
    'seed': 0,
    'teacher': {
        'sizes': {
            'num_layers': 24,
            'num_attention_heads': 24,
            'attention_head_dim': 64,
            'caption_projection_dim': 1536,  # heads x head dim
            'joint_attention_dim': 4096,  # of the text states
            'pooled_projection_dim': 2048,
            'in_channels': 16,
            'sample_size': 128,
            'pos_embed_max_size': 192,
        },
        'context_embedder': True,
        'start': '',  # component folder of a denoiser to continue from
        'stages': 'one',  # per step; or 'all'
        'stage_weights': (),  # relative frequency of the stages; () for equal ones
        'unit_weights': (),
        'caption_dropout': 0.1,
        'corruption': 1 / 3,
        'ema_decay': 0.9999,
        'accumulate': 1,
        'dtype': 'bfloat16',
        # What the backward pass keeps instead of computing it again: 'full' keeps least, then 'kernel', 'dots', 'none'.
        'remat': 'kernel',
        'attention': 'auto',  # 'splash', the TPU kernel, on TPUs, else 'masked'
        'optimizer': defaults(OptimizerConfig, learning_rate=5e-5, warmup_steps=1000),
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
        steps=100_000,
        batch_size=256,
        mesh={'data': 1, 'fsdp': -1, 'tensor': 1},
        evaluate_every=5000,
    ),
    # Data shape for --dry-run without data: latents of 49 frames of 320x512.
    'blank_sample': {'frames': 7, 'height': 40, 'width': 64, 'text_tokens': 128},
}

# Flow matching of a miniature denoiser, also in configs/pruning.py.
TINY_FLOW = {
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
}

TINY = {
    'teacher': {
        **TINY_FLOW,
        'sizes': {
            'num_layers': 2,
            'num_attention_heads': 4,
            'attention_head_dim': 16,
            'caption_projection_dim': 64,
            'joint_attention_dim': 64,
            'pooled_projection_dim': 48,
            'sample_size': 16,
            'pos_embed_max_size': 24,
        },
        'context_embedder': False,
        'ema_decay': 0.99,
    },
    'loop': {
        'steps': 200,
        'batch_size': 16,
        'mesh': {'data': -1, 'fsdp': 1},
        'checkpoint_every': 100,
        'log_every': 20,
        'evaluate_every': 100,
    },
    'blank_sample': {'frames': 3, 'height': 8, 'width': 8},
}

SHAPES = {
    'teacher': {
        'sizes': {
            'num_layers': 4,
            'num_attention_heads': 3,
            'attention_head_dim': 32,
            'caption_projection_dim': 96,
            'joint_attention_dim': 64,
            'pooled_projection_dim': 64,
            'sample_size': 8,
            'pos_embed_max_size': 16,
        },
        'stages': 'all',
        'ema_decay': 0.998,
        'dtype': 'float32',
        'remat': 'none',
        'optimizer': {
            'kind': 'muon',
            'learning_rate': 5e-3,
            'warmup_steps': 150,
            'schedule': 'cosine',
            'decay_steps': 5000,
        },
        'evaluation': {'examples': 64, 'batch': 64, 'samples': 0},
    },
    'loop': {
        'steps': 5000,
        'batch_size': 32,
        'mesh': {'data': -1, 'fsdp': 1},
        'checkpoint_every': 500,
        'log_every': 50,
        'evaluate_every': 1000,
    },
    'blank_sample': {'frames': 3, 'height': 8, 'width': 8, 'text_tokens': 16},
}

STILLS = {
    'teacher': {'context_embedder': False, 'optimizer': {'learning_rate': 4e-3, 'warmup_steps': 50}},
    'blank_sample': {'frames': 1},
}
CONTINUED = {
    'teacher': {
        'context_embedder': False,
        'unit_weights': (2.0, 1.0, 1.0),
        'optimizer': {'learning_rate': 3e-3, 'warmup_steps': 50, 'decay_steps': 3000},
    },
    'loop': {'steps': 3000},
}
PRESETS = {
    'tiny': (TINY,),
    'shapes': (SHAPES,),
    'shapes-stills': (SHAPES, STILLS),
    'shapes-continued': (SHAPES, CONTINUED),
}


def get_config(preset: str = 'full') -> ConfigDict:
    """Return the settings of a preset: full, or one of PRESETS."""
    return preset_of('configs/teacher.py', FULL, PRESETS, preset)
