"""Step distillation: the multi-step denoiser becomes a 1-1-1 student (Neodragon, arXiv 2511.06055, pyramidal DMD).

    python -m train.teacher_samples --checkpoint CKPT --prompts-file prompts.txt --out SAMPLES --count 350000
    python -m train.dmd --config=configs/dmd.py --config.checkpoint=CKPT --config.data=SAMPLES --config.workdir=RUN

full (default): the paper's sizes, 5,000 iterations of three batches of 8. Teacher, student and fake model have 1.5B
parameters each; with the moments of two optimizers that is 42 GB in float32, and the student's average takes 6 GB more,
split over the mesh's fsdp axis. Hardware: 8 accelerators with 16 GB or more (a v5e-8 slice, 8 GPUs); on 16, raise the
batch to 16. Expected (paper): 18 denoiser calls per video, where the teacher needs 480, and VBench 81.61 with the
external first frame. Every 250 steps eight held-out videos are written beside the teacher's to RUN/samples.

tiny: the miniature checkpoint of the test suite; any computer, two minutes on two cores, mostly compilation:

    python -m train.teacher_samples --checkpoint tests/goldens/tiny_checkpoint --prompts-file prompts.txt \
        --out SAMPLES --count 16 --frames 17 --height 64 --width 64 --steps 2 2 2
    JAX_NUM_CPU_DEVICES=8 python -m train.dmd --config=configs/dmd.py:tiny --config.data=SAMPLES --config.workdir=RUN

Expected: RUN/result with a student in the released layout; in RUN/metrics.jsonl `fake_mse` falls from 1.7 to 0.8. The
weights are random, so the videos show nothing.

shapes: the distillation of `train.benchmark`, on the denoiser of configs/teacher.py:shapes, which also generates unit
0; some minutes on two cores.

A student may lose motion when its history is its own frames instead of the teacher's. To train on its own frames as
well, from step 1,000 on, and in all examples from step 3,000 on:

    --config.dmd.own_history.last=1.0 --config.dmd.own_history.ramp_start=1000 --config.dmd.own_history.ramp_steps=2000

Recipes are presets too, alone or after a size, as in shapes-adversarial:

paper (default): matching, and half the regression; the objective of the paper.
adversarial: the paper's with the adversarial term, for sharper single steps; five updates of fake model and critic per
    update of the student, at the rates and Adam betas of One-Forcing (arXiv 2605.23458).
decayed: the regression fades out between steps 1,000 and 2,000 of 5,000, at the coarsest stage from the start; with
    another `loop.steps`, change its ramp_start and ramp_steps.
even: two steps at the two coarse stages, one at full resolution.
first_frame: for a student that also generates unit 0, in two steps per stage. No regression at the coarsest stage:
    there the input is noise that does not depend on the data, and a regression leads to the mean.
consistency: pyramidal mean flow, a start for the others: `--config.dmd.start=RUN1/result/diffusion_transformer_320p`.
pairs: regression on the teacher's own paths from noise to data, of samples made with --store-starts; also a start.
progressive: one step covers two of the teacher's. From 4-4-4 to 1-1-1 in three runs: the first with student_steps and
    student_first_steps (4, 4, 4), each later one with half as many, `--config.dmd.start` of the run before, and
    `--config.dmd.objectives.progressive.finer=start`.
prompts: matching alone, on the student's own videos; the data are prompts and first frames, of train.teacher_samples
    --frames 1 or train.latents --text states. No evaluation, which compares with the teacher's videos.
matching, regression: one of the paper's two terms alone, as controls.

A student of another depth than the teacher: `--config.dmd.start` with a pruned denoiser of train.pruning, or
`--config.dmd.keep=CHOICE/keep.json`. Low-rank updates, for less memory: `--config.dmd.student_lora.rank=64` and
`--config.dmd.fake_lora.rank=64`.

`--dry-run` prints shapes, shardings and bytes per device. `python -m train.aot --config=configs/dmd.py
--topology=v5e:4x4` estimates memory and step time on a TPU slice (docs/tpu_sizing.md). Override any setting:
`--config.dmd.student.learning_rate=2e-6`. Run the same command again to resume.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from train.data.sources import EVALUATION_VIDEOS
from train.dmd.evaluation import EvaluationConfig
from train.dmd.objectives.weighted import ObjectivesConfig
from train.dmd.own_history import OwnHistoryConfig
from train.dmd.trained import DenoiserLoraConfig
from train.runtime.optimizer import OptimizerConfig
from train.runtime.program import LoopConfig
from train.runtime.settings import defaults, preset_of

FULL = {
    'checkpoint': '',  # root of the released layout, with the multi-step denoiser and its adapter
    'teacher': '',  # RUN/result of train.teacher or train.pruning in place of the checkpoint's denoiser
    'data': '',  # folder of train.teacher_samples
    'workdir': '',
    'seed': 0,
    'dmd': {
        'input': 'samples',  # or 'prompts': first frames only; the student's roll-outs replace videos
        'frames': 7,  # latent frames of the roll-outs, with 'prompts'
        'start': '',  # denoiser folder from which student and fake model start; '' for the teacher
        'keep': '',  # blocks of the teacher that they start with, as 0,1,2 or the keep.json of train.prune; '' for all
        'student_lora': defaults(DenoiserLoraConfig),  # rank 0 trains all parameters
        'fake_lora': defaults(DenoiserLoraConfig),
        'protocol': '18',  # '18': external first frame, units 1..6; '21': all units
        'clean_prediction': 'exact',  # or 'paper'
        'student_steps': (1, 1, 1),  # per stage, coarsest first
        'student_first_steps': (1, 1, 1),  # of unit 0
        'fake_updates': 2,
        # How the samples were made; compared with their record.
        'guidance': 5.0,
        'first_guidance': 7.0,
        'teacher_steps': (10, 10, 10),
        'teacher_first_steps': (20, 20, 20),
        'objectives': defaults(ObjectivesConfig),  # weight 0 leaves one out
        # Share of the examples whose history is the student's own frames, from `first` to `last`; paper: 0, 0.
        'own_history': defaults(OwnHistoryConfig),
        'stage_weights': (),  # relative frequency of the stages; () for equal ones
        'unit_weights': (),
        'pairs': False,  # inputs and targets from the teacher's own paths, of samples made with --store-starts
        'levels': 'student',  # or 'uniform', for the consistency objective
        'average': {'decay': 0.99, 'start': 50},  # of the student; decay 0 for none
        'evaluation': defaults(
            EvaluationConfig, videos=EVALUATION_VIDEOS
        ),  # videos 0 and loop.evaluate_every 0 for none
        'accumulate': 1,  # parts of a batch, for less memory
        'gather_student': False,  # once per iteration, not per call: less communication, more memory
        'dtype': 'bfloat16',
        'float32_probes': False,  # float32 token streams where teacher and fake model are compared
        # What the backward pass keeps instead of computing it again: 'full' keeps least, then 'kernel', 'dots', 'none'.
        'remat': 'kernel',
        'attention': 'auto',  # 'splash', the TPU kernel, on TPUs, else 'masked'; or 'prefix', with fewer scores
        'student': defaults(OptimizerConfig),
        'fake': defaults(OptimizerConfig),
    },
    # Data shape for --dry-run and train.aot without data: latents of 49 frames of 320x512.
    'blank_sample': {'frames': 7, 'height': 40, 'width': 64, 'text_tokens': 128},
    'loop': defaults(
        LoopConfig,
        steps=5000,
        batch_size=8,
        mesh={'data': 1, 'fsdp': -1},
        checkpoint_every=250,
        evaluate_every=250,
        keep_best=1,
        best_metric='eval/distance',
        log_every=20,
    ),
}

TINY = {
    'checkpoint': 'tests/goldens/tiny_checkpoint',
    'dmd': {
        'evaluation': {'videos': 0},
        'teacher_steps': (2, 2, 2),
        'dtype': 'float32',
        'remat': 'none',
        'student': {'learning_rate': 1e-3},
        'fake': {'learning_rate': 1e-3},
    },
    'blank_sample': {'frames': 3, 'height': 8, 'width': 8},
    'loop': {
        'steps': 60,
        'log_every': 5,
        'checkpoint_every': 30,
        'evaluate_every': 0,
        'keep_best': 0,
        'mesh': {'data': -1, 'fsdp': 1},
    },
}

SHAPES = {
    'dmd': {
        'protocol': '21',
        'teacher_steps': (8, 8, 8),
        'teacher_first_steps': (8, 8, 8),
        'evaluation': {'videos': 0},
        'dtype': 'float32',
        'remat': 'none',
        'guidance': 2.0,
        'first_guidance': 2.0,
        'student': {
            'kind': 'muon',
            'learning_rate': 2e-3,
            'warmup_steps': 20,
            'schedule': 'cosine',
            'decay_steps': 700,
        },
        'fake': {'kind': 'muon', 'learning_rate': 2e-3, 'warmup_steps': 20},
    },
    'blank_sample': {'frames': 3, 'height': 8, 'width': 8, 'text_tokens': 16},
    'loop': {
        'steps': 700,
        'batch_size': 32,
        'mesh': {'data': -1, 'fsdp': 1},
        'checkpoint_every': 350,
        'evaluate_every': 0,
        'keep_best': 0,
        'log_every': 30,
    },
}

# One-Forcing's optimizer, for the student and for the fake model with the critic.
_ADVERSARIAL_RATES = {'learning_rate': 1e-5, 'betas': (0.0, 0.999), 'weight_decay': 0.01, 'clip_norm': 10.0}
RECIPES = {
    'adversarial': {
        'fake_updates': 5,
        'objectives': {'adversarial': {'weight': 0.03}},
        'student': _ADVERSARIAL_RATES,
        'fake': _ADVERSARIAL_RATES,
    },
    'decayed': {
        'objectives': {
            'regression': {'stages': (0.0, 1.0, 1.0), 'decayed': 0.0, 'ramp_start': 1000, 'ramp_steps': 1000}
        }
    },
    'even': {'student_steps': (2, 2, 1), 'student_first_steps': (2, 2, 1)},
    'first_frame': {
        'protocol': '21',
        'student_first_steps': (2, 2, 2),
        'objectives': {'regression': {'stages': (0.0, 1.0, 1.0)}},
    },
    'consistency': {
        'levels': 'uniform',
        'objectives': {'consistency': {'weight': 1.0}, 'matching': {'weight': 0.0}, 'regression': {'weight': 0.0}},
    },
    'pairs': {'pairs': True, 'objectives': {'matching': {'weight': 0.0}, 'regression': {'weight': 1.0}}},
    'progressive': {
        'objectives': {'progressive': {'weight': 1.0}, 'matching': {'weight': 0.0}, 'regression': {'weight': 0.0}}
    },
    'matching': {'objectives': {'regression': {'weight': 0.0}}},
    'regression': {'objectives': {'matching': {'weight': 0.0}}},
    'prompts': {
        'input': 'prompts',
        'protocol': '18',
        'objectives': {'regression': {'weight': 0.0}},
        'own_history': {'first': 1.0, 'last': 1.0},
        'evaluation': {'videos': 0},
    },
    'paper': {},
}
# Without videos of the teacher, there is nothing to evaluate.
_LOOPS = {'prompts': {'evaluate_every': 0, 'keep_best': 0}}
_CHANGES = {recipe: {'dmd': changes, 'loop': _LOOPS.get(recipe, {})} for recipe, changes in RECIPES.items()}
# Small models learn at the rates of their size.
_SIZES = {
    'full': ((), {}),
    'tiny': ((TINY,), {'dmd': {name: TINY['dmd'][name] for name in ('student', 'fake')}}),
    'shapes': ((SHAPES,), {'dmd': {name: SHAPES['dmd'][name] for name in ('student', 'fake')}}),
}
# As at full size, the regression of recipe `decayed` fades out from a fifth to two fifths of the steps.
_FIFTHS = {'tiny': TINY['loop']['steps'] // 5, 'shapes': SHAPES['loop']['steps'] // 5}
_SHORTER = {
    (size, 'decayed'): {'dmd': {'objectives': {'regression': {'ramp_start': fifth, 'ramp_steps': fifth}}}}
    for size, fifth in _FIFTHS.items()
}
PRESETS = {
    **{size: changes for size, (changes, _) in _SIZES.items()},
    **{recipe: (changes,) for recipe, changes in _CHANGES.items()},
    **{
        f'{size}-{recipe}': (*before, changes, rates, _SHORTER.get((size, recipe), {}))
        for size, (before, rates) in _SIZES.items()
        for recipe, changes in _CHANGES.items()
    },
}


def get_config(preset: str = 'full') -> ConfigDict:
    """Return the settings of a preset: one of PRESETS."""
    return preset_of('configs/dmd.py', FULL, PRESETS, preset)
