"""The teacher: autoregressive pyramidal flow matching over latent frames, trained on latents of images and videos.

    python -m train.teacher --config=configs/teacher.py:tiny --config.data=FOLDER --config.workdir=DIR

    x    = level start + (1 - level) end of one unit at one stage, after its corrupted history
    loss = || D(x) - (start - end) ||^2, the caption dropped with probability 0.1

`flow_matching.py` makes these examples. The result is the multi-step denoiser, the teacher of train.dmd.

A step trains one stage, with all units in one shape (the envelope), or every stage, each in separate sequences. The
alternative, one packed sequence of all three stages with segment masks, gives the same flows but takes more than twice
the time per sample (docs/results.md): attention has 2.2 times the scores, most of them masked.

Source: Pyramid-Flow, arXiv 2410.05954, section 3 and appendix (recipe).
Legend: B batch, T latent frames (= units), H W latent grid, C channels, L text tokens, E width of the text states,
p pooled width.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import as_json
from neodragon_jax.base.lists import comma_list
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import example_inputs
from neodragon_jax.checkpoint.classes import class_name
from neodragon_jax.checkpoint.folders import PYRAMID_FLOW, TEACHER, TEACHER_ADAPTER
from neodragon_jax.models.teacher import TeacherMMDiT
from neodragon_jax.pyramid.sampler import Prompt, jax_denoiser
from neodragon_jax.pyramid.schedule import Schedule
from train.data import DTYPES, SampleSource
from train.data.mixture import Mixture, drop_captions
from train.data.record_spec import T5_STATES, TEXT_STATES
from train.data.sources import hold_out, stacked
from train.flow import flow_matching, losses
from train.flow.blank_sample import BlankSample
from train.flow.unused import Unused, unused_in_stages
from train.runtime.gradients import value_and_grad
from train.runtime.model_flops import plain_denoiser
from train.runtime.optimizer import AveragedState, make_optimizer, masters
from train.runtime.platform import attention_on_platform
from train.runtime.program import LoopConfig
from train.runtime.runner import Recipe, Training
from train.runtime.sharding import to_host
from train.teacher.config import TeacherConfig
from train.teacher.denoisers import (
    AnyDenoiser,
    abstract_denoiser,
    blank_latents,
    check_widths,
    fresh_denoiser,
    read_denoiser,
    sized,
    without_embedder,
)
from train.teacher.evaluation import FlowEvaluation, predict_flow
from train.text.parts import deployed_adapter


class TeacherTraining:
    """Program of pyramidal flow matching for the training loop."""

    name = 'teacher'
    shown = ('loss', 'grad_norm')

    def __init__(
        self,
        config: TeacherConfig,
        null: Mapping[str, np.ndarray],
        held_out: Mapping[str, np.ndarray] | None = None,
        data: Mapping[str, Any] | None = None,
        denoiser: tuple[AnyDenoiser, Any] | None = None,
    ) -> None:
        """Build the denoiser, or read the one to continue from.

        Args:
          null: embedding of a dropped caption: t5 or text [L, E], text_mask [L], pooled [p].
          held_out: samples to evaluate on, with a leading axis; None turns the evaluation off.
          data: JSON that identifies the samples and that a resumed run must share.
          denoiser: denoiser to continue from, and its parameters stacked for the scan; default: read `config.start`.
        Raises:
          InputError: the denoiser cannot be read, or does not fit the text states.
        """
        self.config, self.schedule, self.data = config, Schedule(), dict(data or {})
        if denoiser is None and config.start:
            denoiser = read_denoiser(config.start)
        module, self.start = denoiser or (fresh_denoiser(config.sizes, config.context_embedder), None)
        options = {'dtype': DTYPES[config.dtype], 'remat': config.remat}
        self.module = module.clone(scan=True, attention=attention_on_platform(config.attention), **options)
        self.null = self.prompts(null)
        check_widths(self.module, self.null)
        self.tx = make_optimizer(config.optimizer)
        self.evaluation = None
        if held_out is not None:
            whole = np.full(len(held_out['latents']), held_out['latents'].shape[1], np.int32)
            arrays = {'latents': held_out['latents'], 'units': held_out.get('units', whole)} | self.prompts(held_out)
            self.evaluation = FlowEvaluation(config.evaluation, self.apply, arrays, self.null, self.schedule)

    def plain(self) -> Self:
        """Return the program without recomputation and padding, itself if it has none."""
        module, config = plain_denoiser(self.module), dataclasses.replace(self.config, accumulate=1)
        if (module, config) == (self.module, self.config):
            return self
        plain = copy.copy(self)
        plain.module, plain.config = module, config
        return plain

    def prompts(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return text, text_mask and pooled of samples, whichever name their text states have.

        Raises:
          InputError: the samples lack the text states of this kind of denoiser.
        """
        name = T5_STATES if isinstance(self.module, TeacherMMDiT) else TEXT_STATES
        if name not in batch:
            kind, option = ('with a', 't5') if name == T5_STATES else ('without a', 'states')
            raise InputError(
                f'the samples have no {name}, which a denoiser {kind} context embedder reads: make them with '
                f'train.latents --text {option}, or change config.teacher.context_embedder.'
            )
        return {'text': batch[name], 'text_mask': batch['text_mask'], 'pooled': batch['pooled']}

    def frozen(self) -> dict[str, Any]:
        """Return the initial parameters, if they were read."""
        return {} if self.start is None else {'start': self.flat(self.start)}

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> AveragedState:
        """Return the state before the first step."""
        if self.start is None:
            params = self.flat(self.module.init(key, *example_inputs(self.module))['params'])
        else:
            params = masters(frozen['start'])
        return AveragedState.begin(params, self.tx, self.config.ema_decay)

    def variant(self, step: int) -> tuple[int, ...]:
        """Return the stages that a step trains."""
        stages = self.schedule.stages
        if self.config.stages == 'all':
            return tuple(range(stages))
        return (flow_matching.stage_of_step(self.config.seed, step, stages, self.config.stage_weights),)

    def unused(self, variant: tuple[int, ...], sample: Mapping[str, Any]) -> Unused:
        """Return the unused shares of the arithmetic of a step on samples of one shape, all of whole videos."""
        return unused_in_stages(variant, sample, self.module.config, self.schedule, 0, self.config.unit_weights)

    def train_step(
        self, variant: tuple[int, ...], state: AveragedState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[AveragedState, dict[str, Array]]:
        """Run one update.

        Args:
          variant: the stages to train.
          batch: latents [B, T, H, W, C], units [B] (absent where all samples are whole videos), t5 or text [B, L, E],
            text_mask [B, L], pooled [B, p].
        """
        del frozen
        batch = {name: batch[name] for name in ('latents', 'units') if name in batch} | self.prompts(batch)
        loss_of = functools.partial(self.loss, variant)
        (loss, sums), grads = value_and_grad(loss_of, state.params, batch, key, self.config.accumulate)
        metrics = {'loss': loss, 'grad_norm': optax.global_norm(grads)}
        for stage, values in sums.items():
            metrics |= flow_matching.unit_means(values, f'stage{stage}')
        return state.updated(grads, self.tx, self.config.ema_decay), metrics

    def loss(
        self, stages: tuple[int, ...], params: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[Float[Array, ''], dict[int, Float[Array, '2 T']]]:
        """Return the flow matching loss (mean over the stages), and its sums by stage and unit (`unit_sums`)."""
        prompt, examples = self.examples(stages, batch, key)
        denoise, means, sums = jax_denoiser(self.apply, params), [], {}
        for stage, example in examples.items():
            errors = losses.squared_error(predict_flow(denoise, stage, example, prompt), example.flow)
            means.append(jnp.mean(errors))
            sums[stage] = flow_matching.unit_sums(errors, example.unit, batch['latents'].shape[1])
        return jnp.mean(jnp.stack(means)), sums

    def examples(
        self, stages: tuple[int, ...], batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[Prompt, dict[int, flow_matching.Example]]:
        """Return the prompts of a batch after caption dropout, and its examples by stage."""
        drop_key, *keys = jax.random.split(key, 1 + len(stages))
        batch = drop_captions(drop_key, batch, self.null, self.config.caption_dropout)
        latents: Float[Array, 'B T H W C'] = batch['latents']
        units = batch.get('units', jnp.full(latents.shape[:1], latents.shape[1], jnp.int32))
        examples = {}
        for stage, stage_key in zip(stages, keys, strict=True):
            options = self.config.corruption, self.config.unit_weights
            draws = flow_matching.draw(stage_key, stage, latents.shape, units, self.schedule, *options)
            examples[stage] = flow_matching.build(stage, latents, draws, self.schedule)
        return Prompt(batch['text'], batch['text_mask'], batch['pooled']), examples

    def apply(self, variables: Mapping[str, Any], *arguments: Any) -> Float[Array, 'B 1 h w C']:
        """Run the denoiser on parameters in the layout of the state."""
        return self.module.apply({'params': self.nested(variables['params'])}, *arguments)  # pyright: ignore[reportReturnType]

    def flat(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the module's parameters in the layout of the state: those of the denoiser and embedder at one level.

        The optimizer identifies its fixed entries at the top level.
        """
        if not isinstance(self.module, TeacherMMDiT):
            return dict(params)
        return {'context_embedder': params['context_embedder'], **params['denoiser']}

    def nested(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Undo `flat`."""
        if not isinstance(self.module, TeacherMMDiT):
            return dict(params)
        denoiser = {name: value for name, value in params.items() if name != 'context_embedder'}
        return {'context_embedder': params['context_embedder'], 'denoiser': denoiser}

    def evaluate(self, state: AveragedState, frozen: Any, folder: pathlib.Path) -> dict[str, float]:
        """Return the losses per unit and stage on held-out samples, and write guided samples."""
        del frozen
        return {} if self.evaluation is None else self.evaluation(state.result, folder)

    def finish(self, state: AveragedState, folder: pathlib.Path) -> None:
        """Write the denoiser in the released layout, and `teacher.json`.

        With a context embedder, also write the whole model in Pyramid-Flow's layout, and the embedder as the context
        adapter of this denoiser: an adapter without hidden layers.
        """
        params, step = to_host((state.result, state.step))
        params = self.nested(params)
        if jax.process_index() != 0:
            return
        if isinstance(self.module, TeacherMMDiT):
            checkpoint.save(folder / PYRAMID_FLOW, self.module, params)
            checkpoint.save(folder / TEACHER, *without_embedder(self.module, params))
            embedder = params['context_embedder']
            checkpoint.save(folder / TEACHER_ADAPTER, *deployed_adapter('none', None, {}, embedder))
        else:
            checkpoint.save(folder / TEACHER, self.module, params)
        with atomic_file(folder / 'teacher.json') as path:
            path.write_text(json.dumps(self.metadata() | {'iterations': int(step)}, indent=2) + '\n')

    def metadata(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share: sizes, objective and data, but not learning rates."""
        names = ('stages', 'stage_weights', 'unit_weights', 'caption_dropout', 'corruption', 'ema_decay', 'seed')
        sizes = {'class': class_name(self.module)} | self.module.config.to_json()
        record = {name: getattr(self.config, name) for name in names} | {'sizes': sizes, 'data': self.data}
        return as_json(record)


AnyTeacher = TypeVar('AnyTeacher', bound=TeacherTraining)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of configs/teacher.py.

    Attributes:
      data: folders of train.latents, separated by commas.
      weights: share of each folder; () for equal ones.
      workdir: folder of the run.
      seed: seed of parameters, data order and all randomness in steps.
      blank_sample: sizes of a sample in a plan without data.
    """

    data: str
    weights: tuple[float, ...]
    workdir: str
    seed: int
    teacher: TeacherConfig
    blank_sample: BlankSample
    loop: LoopConfig


def load(settings: Settings) -> Training:
    """Return the training on folders of latents.

    Raises:
      InputError: the data does not fit the settings.
    """
    folders = comma_list(settings.data)
    program, source = load_program(settings.teacher, folders, settings.weights or [1.0] * len(folders))
    return Training(program, source, settings.loop)


def load_program(
    config: TeacherConfig,
    folders: Sequence[str],
    weights: Sequence[float],
    make: Callable[..., AnyTeacher] = TeacherTraining,
) -> tuple[AnyTeacher, Mixture]:
    """Return the program for folders of latents, and the samples to train on.

    Args:
      weights: share of each folder.
      make: constructor of the program, with the arguments of `TeacherTraining`.
    Raises:
      InputError: a folder does not hold latents or is too small, the folders are incompatible, or there are too few
        unit weights.
    """
    examples, seed = config.evaluation.examples, config.seed
    if len(folders) != len(weights) or examples % len(folders):
        raise InputError(
            f'{len(folders)} folders of data, {len(weights)} weights, {examples} examples held out: give a weight for '
            'each folder, and examples that the folders share evenly.'
        )
    sources = [SampleSource(folder) for folder in folders]
    shapes = [list(source.spec.latents) for source in sources]
    units = max(frames for frames, *_ in shapes)
    flow_matching.check_unit_weights('config.teacher.unit_weights', config.unit_weights, units)
    setting = 'config.teacher.evaluation.examples'
    each = examples // len(sources)
    parts = [
        hold_out(source, each, setting=f'{setting}, {folder}') for folder, source in zip(folders, sources, strict=True)
    ]
    training = Mixture([part for part, _ in parts], weights, seed)
    held_out = stacked(Mixture([part for _, part in parts], [1] * len(parts), seed))
    data = {'latents': shapes, 'protocols': [source.protocol for source in sources], 'held_out': examples}
    data |= {'mixture': training.metadata()}
    return make(config, Mixture(sources, weights).null(), held_out, data), training


def abstract(settings: Settings) -> Training:
    """Return the training as shapes.

    Raises:
      InputError: the folder `start` holds no denoiser, or there are too few unit weights.
    """
    config = settings.teacher
    denoiser = abstract_denoiser(config.start) if config.start else None
    blank = blank_latents(settings.blank_sample, config if denoiser is None else sized(config, denoiser[0]))
    return Training(TeacherTraining(config, blank[0], denoiser=denoiser), blank, settings.loop)


RECIPE = Recipe(Settings, load, abstract, required=dict.fromkeys(('data', 'workdir'), 'FOLDER'))
