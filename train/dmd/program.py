"""Pyramidal distribution matching: distills a multi-step denoiser into one with few steps per stage.

    python -m train.dmd --config=configs/dmd.py:tiny --config.data=FOLDER --config.workdir=DIR

Three copies of the multi-step denoiser: the frozen *teacher* D, guided; the *student* D_theta, the future few-step
model; the *fake* model D_phi, which follows the student's output distribution. One iteration is
`fake_updates` updates of the fake model, then one of the student:

    x        = the data's noisy latent at a stage, at one of the student's own levels (1 for 1-1-1)
    z_theta  = clean_prediction(x, D_theta(x))
    y0, y1   = stage_pair(z_theta, fresh noise); z_tau between them
    fake:      || D_phi(z_tau) - (y0 - y1) ||^2, z_theta detached, tau ~ U(0, 1)
    student:   gradient w (D(z_tau) - D_phi(z_tau)) on z_theta, plus 0.5 log(1 + ||z_theta - z||^2)

The history before x is the data's, or in a share of the examples the student's own (`own_history.py`). The student's
objectives are parts with weights (`objectives/`); the two above are the default.

Source: Neodragon, arXiv 2511.06055, section on step distillation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.schedule import Schedule
from train.data import DTYPES, SampleSource
from train.data.sources import Repeated, hold_out, stacked
from train.dmd.config import DMDConfig
from train.dmd.distillation import DMD
from train.dmd.prompt_source import PromptSource
from train.dmd.provenance import check_samples
from train.dmd.teacher import abstract_teacher, read_teacher
from train.dmd.trained import read_start
from train.flow.blank_sample import BlankSample
from train.flow.stage_starts import check_stored, start_shapes
from train.runtime.program import LoopConfig
from train.runtime.runner import Recipe, Training
from train.runtime.settings import CheckpointText, PathText


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of configs/dmd.py.

    Attributes:
      checkpoint: root of the released layout, with the multi-step denoiser and its adapter.
      teacher: RUN/result of train.teacher or train.pruning in place of the checkpoint's denoiser; '' for none.
      data: folder written by train.teacher_samples.
      workdir: folder of the run.
      seed: seed of parameters, data order and all randomness in steps.
      blank_sample: the sample assumed when a run is planned without data.
    """

    checkpoint: CheckpointText
    teacher: PathText
    data: str
    workdir: str
    seed: int
    dmd: DMDConfig
    blank_sample: BlankSample
    loop: LoopConfig

    def __post_init__(self) -> None:
        own, batch = self.dmd.own_history, self.loop.batch_size
        if own.enabled and own.videos > batch:
            raise InputError(
                f'config.dmd.own_history.videos is {own.videos}, but config.loop.batch_size is {batch}: a roll-out '
                f'takes the prompts of one batch. Set it to at most {batch}, or to 0 for the whole batch.'
            )

    @property
    def run(self) -> LoopConfig:
        """Settings of the run, with one batch per update."""
        return dataclasses.replace(self.loop, updates=self.dmd.updates)


def load(settings: Settings) -> Training:
    """Return the training on a folder of samples.

    Raises:
      InputError: the samples do not suit the checkpoint or the settings.
    """
    source, config, run = SampleSource(settings.data), settings.dmd, settings.run
    if bool(run.evaluate_every) != bool(config.evaluation.videos):
        raise InputError(
            f'config.loop.evaluate_every is {run.evaluate_every}, config.dmd.evaluation.videos '
            f'{config.evaluation.videos}; set both, or both to 0.'
        )
    setting = f'config.dmd.evaluation.videos, {settings.data}'
    training, held_out = hold_out(source, config.evaluation.videos, source.protocol.get('prompt_count', 0), setting)
    program = load_program(config, source, stacked(held_out) if held_out else None)
    return Training(program, training if config.input == 'samples' else PromptSource(training, config.frames), run)


def load_program(config: DMDConfig, source: SampleSource, held_out: Mapping[str, Any] | None = None) -> DMD:
    """Return the program for samples.

    Args:
      held_out: samples to evaluate on, with a leading axis.
    Raises:
      InputError: the samples do not suit the checkpoint or the settings.
    """
    check_samples(config, source.protocol)
    if config.pairs:
        check_stored(source.spec.arrays, Schedule().stages)
    teacher = read_teacher(config.checkpoint, config.teacher)
    frames = source.spec.latents[0] if config.input == 'samples' else config.frames
    start = read_start(config.start, config.keep, teacher.module)
    return DMD(config, source.negative(), frames, teacher, source.protocol, held_out, start)


def abstract(settings: Settings) -> Training:
    """Return the training as shapes: of the released sizes where the settings name no checkpoint."""
    teacher, shapes = abstract_teacher(settings.checkpoint), settings.blank_sample
    if settings.dmd.input == 'prompts':
        shapes = dataclasses.replace(shapes, frames=settings.dmd.frames)
    sizes, stored = teacher.module.config, DTYPES['bfloat16']
    sample = {
        'latents': np.zeros((shapes.frames, shapes.height, shapes.width, sizes.in_channels), stored),
        'text': np.zeros((shapes.text_tokens, sizes.width), stored),
        'text_mask': np.zeros(shapes.text_tokens, np.int32),
        'pooled': np.zeros(sizes.pooled_projection_dim, stored),
    }
    if settings.dmd.pairs:
        starts = start_shapes(sample['latents'].shape, Schedule().stages)
        sample |= {name: np.zeros(shape, stored) for name, shape in starts.items()}
    shaped = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in sample.items()}
    start = read_start(settings.dmd.start, settings.dmd.keep, teacher.module, abstract=True)
    program = DMD(settings.dmd, shaped, shapes.frames, teacher, start=start)
    return Training(program, Repeated(sample, 2**20), settings.run)


RECIPE = Recipe(Settings, load, abstract, required=dict.fromkeys(('checkpoint', 'data', 'workdir'), 'FOLDER'))
