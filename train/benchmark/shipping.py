"""Writer of the benchmark's result as a checkpoint small enough to ship: bfloat16, with its own generation.json."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np

from neodragon_jax.base.atomic import atomic_file, atomic_folder
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.folders import CLIP_G, CLIP_L, STUDENT, STUDENT_ADAPTER, TOKENIZERS
from neodragon_jax.checkpoint.params import cast
from neodragon_jax.generation import defaults as generation
from train.benchmark.chain import ADAPTER, DENOISER, TEXT_ENCODER, VAE, Chain
from train.benchmark.students import STUDENTS, Student
from train.benchmark.tiers import Tier
from train.shapes.captions import caption
from train.shapes.world import WORLDS, World

ENCODERS = (CLIP_L, CLIP_G, TEXT_ENCODER)
# Numbers of prompts in the lists.
CALIBRATED, EVALUATED = 60, 16


def write(chain: Chain) -> pathlib.Path:
    """Write teacher, student and their components to a folder of the seed, replacing it; return the folder.

    Raises:
      InputError: one of them is not trained.
    """
    out, student = chain.shipped, chain.result(chain.students[0])
    parts = {name: chain.distilled_text / name for name in (*ENCODERS, VAE, DENOISER, ADAPTER)}
    parts |= {STUDENT: student / STUDENT, STUDENT_ADAPTER: student / STUDENT_ADAPTER}
    absent = [str(path) for path in parts.values() if not path.is_dir()]
    if absent:
        raise InputError(f'{absent[0]}: does not exist, so that the seed cannot be evaluated. Leave out --only.')
    with atomic_folder(out, replace=True) as partial:
        for name in TOKENIZERS:
            shutil.copytree(chain.distilled_text / name, partial / name)
        for name, source in parts.items():
            module, params = checkpoint.load(source)
            checkpoint.save(partial / name, module, cast(params, jnp.bfloat16))
        for name, captions in prompt_lists(WORLDS[chain.tier.world]).items():
            with atomic_file(partial / name) as path:
                path.write_text('\n'.join(captions) + '\n')
        with atomic_file(partial / generation.FILE) as path:
            path.write_text(json.dumps(defaults(chain.tier, STUDENTS[chain.students[0]]), indent=2) + '\n')
    return out


def prompt_lists(world: World) -> dict[str, list[str]]:
    """Return the prompts of exports: name of a file -> captions. Those of the evaluation are held out from training.

    In a world whose captions omit attributes, all are trained; there the two lists are disjoint.
    """
    rng = np.random.default_rng(0)

    def captions(split: str) -> list[str]:
        found = list(dict.fromkeys(caption(world.captioned(traits)) for traits in world.combinations(split)))
        return [found[index] for index in rng.permutation(len(found))]

    evaluation = captions('held_out')[: min(EVALUATED, len(captions('all')) // 3)]
    calibration = [text for text in captions('train') if text not in evaluation][:CALIBRATED]
    return {'calibration_prompts.txt': calibration, 'evaluation_prompts.txt': evaluation}


def defaults(tier: Tier, student: Student) -> dict[str, object]:
    """Return the contents of generation.json: the checkpoint's defaults for `python -m neodragon_jax`."""
    world = WORLDS[tier.world]
    example = caption(world.captioned(world.combinations('train')[0]))
    return {
        'world': tier.world,
        'mode': 'hybrid',
        'frames': tier.frames,
        'height': tier.height,
        'width': tier.width,
        'prompt_modifier': '',
        'negative_prompt': '',
        'modes': {
            'hybrid': {'first_frame': 'denoiser', **_schedule(student)},
            'monolithic': {'steps': list(tier.steps), 'guidance': tier.guidance},
        },
        'prompts': f'captions such as "{example}"',
        'example': example,
    }


def _schedule(student: Student) -> dict[str, object]:
    """Return the steps of a student that has several in a stage."""
    if student.steps == student.first_steps == (1, 1, 1):
        return {}
    return {'steps': list(student.steps), 'first_steps': list(student.first_steps), 'spacing': 'even'}
