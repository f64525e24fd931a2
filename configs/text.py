"""Text-encoder distillation: DT5 and a context adapter replace T5-XXL (Neodragon, arXiv 2511.06055).

    python -m train.text --config=configs/text.py --config.data=PROMPTS --config.teacher=T5XXL \
        --config.embedder=PYRAMID_FLOW/diffusion_transformer_384p --config.encoder=CKPT/text_encoder_3 \
        --config.workdir=RUN

PROMPTS is a folder of train.prompts; no pictures are needed. T5XXL and the embedder's folder are Pyramid-Flow's. Leave
config.teacher empty where the samples hold T5-XXL's states (train.text_states). RUN/result gets
`context_adapter_multistep_t2v` and, where DT5 changed, `text_encoder_3`, both in the released layout: copy them into a
checkpoint. The modes (train/text/parts.py explains how each is stored):

    --config.text.adapter=replace                              the deployed one [RM] (default)
    --config.text.adapter=extend                               before the embedder [EM]; stored joined to it
    --config.text.adapter=none --config.text.encoder=lora      low-rank updates of DT5 alone; stored merged, and apart
    --config.text.encoder=trained                              DT5 as well [TDT5]

full (default): 100,000 steps of 256 prompts, 18 epochs of 1.4M. T5-XXL is 9.5 GB in bfloat16, split over the mesh's
fsdp axis. Hardware: 8 accelerators with 16 GB; one with stored states. `--dry-run` needs neither data nor weights.
Expected (paper): VBench 79.64, where T5-XXL has 80.31.

tiny: a random teacher of the widths of the test suite's miniature checkpoint; any computer, half a minute on two cores.
PROMPTS needs some hundreds of lines:

    python -m train.random_teacher --out out/random_teacher
    python -m train.prompts --checkpoint tests/goldens/tiny_checkpoint --file prompts.txt --out PROMPTS
    python -m train.text --config=configs/text.py:tiny --config.data=PROMPTS --config.workdir=RUN

Expected on 1,200 prompts made of 36 words, 1,000 of them held out (--config.text.held_out=1000): `loss` from 1.24 (the
first 20 steps) to 0.49 (step 300), `eval/retrieval/mean_rank` 106 among 1,000, where chance has 500. On 5,760 such
prompts and 1,500 steps `eval/retrieval/top1` is 0.10 (adapter replace), 0.10 (extend), 0.11 (none, with lora), and 0.88
with a trained DT5, whose weights are random here.

shapes: the text encoder of `train.benchmark`: a T5 with half of the teacher's parameters, trained from random weights.
Ten minutes on one core.

Override any setting: `--config.text.cosine_weight=0`. Run the same command again to resume.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from train.runtime.program import LoopConfig
from train.runtime.settings import defaults, preset_of
from train.text.config import TextConfig

FULL = {
    'data': '',  # folder of train.prompts
    'workdir': '',
    'encoder': '',  # component folder of DT5
    'embedder': '',  # component folder of Pyramid-Flow's denoiser
    'teacher': '',  # component folder of T5-XXL; '' where the samples hold its states
    'start': '',  # component folder of a context adapter to continue from
    'seed': 0,
    'text': defaults(TextConfig),
    'loop': defaults(
        LoopConfig,
        steps=100_000,
        batch_size=256,
        mesh={'data': 1, 'fsdp': -1, 'tensor': 1},
        evaluate_every=2000,
    ),
    # Data fields for --dry-run without data: token ids, with or without T5-XXL's states.
    'text_tokens': 128,
    'cached': False,
}

TINY = {
    'encoder': 'tests/goldens/tiny_checkpoint/text_encoder_3',
    'embedder': 'out/random_teacher/pyramid_flow_dit',
    'teacher': 'out/random_teacher/text_encoder',
    'text': {
        'hidden': (48, 48),
        'held_out': 16,
        'held_out_batch': 16,
        'dtype': 'float32',
        'lora': {'rank': 4, 'alpha': 4.0},
        'optimizer': {'learning_rate': 3e-3, 'warmup_steps': 10},
    },
    'loop': {
        'steps': 300,
        'batch_size': 16,
        'mesh': {'data': -1, 'fsdp': 1},
        'checkpoint_every': 150,
        'log_every': 20,
        'evaluate_every': 100,
    },
}

SHAPES = {
    'text': {
        'encoder': 'trained',
        'hidden': (384, 384),
        'cosine_weight': 2.0,
        'held_out': 256,
        'held_out_batch': 64,
        'dtype': 'float32',
        'optimizer': {
            'kind': 'muon',
            'learning_rate': 1e-2,
            'warmup_steps': 50,
            'schedule': 'cosine',
            'decay_steps': 5000,
        },
    },
    'loop': {
        'steps': 5000,
        'batch_size': 64,
        'mesh': {'data': -1, 'fsdp': 1},
        'checkpoint_every': 1000,
        'log_every': 50,
        'evaluate_every': 1000,
    },
    'text_tokens': 16,
}


def get_config(preset: str = 'full') -> ConfigDict:
    """Return the settings of a preset: full, tiny or shapes."""
    return preset_of('configs/text.py', FULL, {'tiny': (TINY,), 'shapes': (SHAPES,)}, preset)
