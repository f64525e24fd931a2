"""Step distillation: the multi-step denoiser becomes a 1-1-1 student (Neodragon, arXiv 2511.06055, pyramidal DMD).

    python -m train.teacher_samples --checkpoint CKPT --prompts-file prompts.txt --out SAMPLES --count 350000
    python -m train.dmd --config=configs/dmd.py --config.checkpoint=CKPT --config.data=SAMPLES --config.workdir=RUN

full (the default): the paper's sizes, 5,000 iterations of three batches of 8. Teacher, student and fake model have
1.5B parameters each; with the moments of two optimizers that is 42 GB in float32, split over the mesh's fsdp axis. For
8 accelerators with 16 GB or more (a v5e-8 slice, 8 GPUs); on 16, raise the batch to 16. Expected, by the paper: 18
denoiser calls per video where the teacher needs 480, at VBench 81.61 with the external first frame.

tiny: the miniature checkpoint of the test suite; any computer, two minutes on two cores, most of them compiling:

    python -m train.teacher_samples --checkpoint tests/goldens/tiny_checkpoint --prompts-file prompts.txt \
        --out SAMPLES --count 16 --frames 17 --height 64 --width 64 --steps 2 2 2 --first-steps 2 2 2
    JAX_NUM_CPU_DEVICES=8 python -m train.dmd --config=configs/dmd.py:tiny --config.data=SAMPLES --config.workdir=RUN

Expected: RUN/result with a student in the released layout; in RUN/metrics.jsonl `fake_mse` falls from 1.7 to 0.8. The
weights are random, so there is nothing to see in the videos.

`--dry-run` prints shapes, shardings and bytes per device. Any setting: `--config.dmd.student.learning_rate=2e-6`. The
same command goes on where a run was stopped.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from neodragon_jax.errors import InputError


def get_config(preset: str = 'full') -> ConfigDict:
    """Return the settings; `preset` is what follows the colon of --config=configs/dmd.py:tiny."""
    if preset not in ('', 'full', 'tiny'):
        raise InputError(f'configs/dmd.py:{preset}: no such preset; use full or tiny.')
    config = ConfigDict(
        {
            'checkpoint': '',  # root of the released layout, with the multi-step denoiser and its adapter
            'data': '',  # folder of train.teacher_samples
            'workdir': '',
            'seed': 0,
            'dmd': {
                'protocol': '18',  # '18': external first frame, units 1..6; '21': all units
                'clean_prediction': 'exact',  # or 'paper'
                'student_steps': 1,
                'fake_updates': 2,
                'student_taus': (0.125, 0.375, 0.625, 0.875),
                'guidance': 5.0,
                'first_guidance': 7.0,
                'cauchy_weight': 0.5,
                'dtype': 'bfloat16',
                'remat': 'full',
                'student': optimizer(learning_rate=1e-6, warmup_steps=0),
                'fake': optimizer(learning_rate=1e-6, warmup_steps=0),
            },
            'loop': {
                'steps': 5000,
                'batch_size': 8,
                'mesh': {'data': 1, 'fsdp': -1, 'tensor': 1},
                'checkpoint_every': 250,
                'keep': 3,
                'log_every': 20,
                'max_skips': 20,
                'progress': True,
                'distributed': False,
            },
        }
    )
    if preset == 'tiny':
        rates = {'student': {'learning_rate': 1e-3}, 'fake': {'learning_rate': 1e-3}}
        config.update(
            {
                'checkpoint': 'tests/goldens/tiny_checkpoint',
                'dmd': {'dtype': 'float32', 'remat': 'none', **rates},
                'loop': {'steps': 60, 'log_every': 5, 'checkpoint_every': 30, 'mesh': {'data': -1, 'fsdp': 1}},
            }
        )
    return config


def optimizer(learning_rate: float, warmup_steps: int) -> dict[str, object]:
    """Return the settings of one AdamW; Pyramid-Flow's recipe (arXiv 2410.05954) but for the rate."""
    return {
        'learning_rate': learning_rate,
        'warmup_steps': warmup_steps,
        'betas': (0.9, 0.95),
        'epsilon': 1e-8,
        'weight_decay': 1e-4,
        'clip_norm': 1.0,
    }
