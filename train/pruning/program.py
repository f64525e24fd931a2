"""Block pruning: trains a denoiser without some of its blocks in two stages to match the full one.

    python -m train.pruning --config=configs/pruning.py:stage1 --config.denoiser=FULL --config.keep=OUT/keep.json ...

    stage 1: flow matching on data, as in `train.teacher`; a few hundred steps
    stage 2: for every kept block k   image_weight || image_k - teacher image ||^2
                                    + text_weight (1 - cos(text_k, teacher text)), means over tokens and blocks
             and on the flow          output_weight || D - D_teacher ||^2 + data_weight || D - (start - end) ||^2

The teacher of stage 2 is the full denoiser on the same inputs, without guidance. `mapping` selects the target of a kept
block: 'simple', the same block of the teacher; 'next', the input of the next kept block, so that it also learns the
function of the removed blocks in between. `train.prune` chooses the blocks.

Source: Neodragon, arXiv 2511.06055, section on block pruning. There, stage 2 fails without stage 1. The weights
are specific to this project.
Legend: B batch, T latent frames (= units), K kept blocks but the last, I image tokens, L text tokens, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.lists import comma_list
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.config.pyramid_flow import TEACHER
from neodragon_jax.models.teacher import TeacherMMDiT
from train.flow import flow_matching, losses
from train.flow.blank_sample import BlankSample
from train.pruning.config import WEIGHTS, PruningConfig
from train.pruning.features import Features, observer, with_features
from train.pruning.keep_list import check_keep, prune, read_keep
from train.runtime.gradients import value_and_grad
from train.runtime.model_flops import plain_denoiser
from train.runtime.optimizer import AveragedState
from train.runtime.program import LoopConfig
from train.runtime.runner import Recipe, Training
from train.runtime.settings import PathText
from train.teacher.denoisers import (
    AnyDenoiser,
    abstract_denoiser,
    abstract_stacked,
    blank_latents,
    read_denoiser,
    sized,
)
from train.teacher.evaluation import predict_flow
from train.teacher.program import TeacherConfig, TeacherTraining, load_program
from train.text.losses import token_errors

# The paper keeps 18 of 24 blocks; sizes do not depend on the choice of blocks.
PUBLISHED_KEEP = (*range(17), 23)


class Denoisers(NamedTuple):
    """The networks of the pruning. Parameters are stacked for the scan; they are abstract in a plan.

    Attributes:
      full_module, full: the denoiser with all its blocks, and its parameters.
      module, start: the pruned denoiser, and its initial parameters.
      keep: indices of the kept blocks.
      fingerprint: fingerprint of the full denoiser.
    """

    full_module: AnyDenoiser
    full: Any
    module: AnyDenoiser
    start: Any
    keep: tuple[int, ...]
    fingerprint: str


def read_denoisers(pruning: PruningConfig) -> Denoisers:
    """Read the full denoiser, and prune it or read a pruned one.

    Raises:
      InputError: a denoiser cannot be read, the keep list is invalid, or the denoisers do not match.
    """
    full_module, full = read_denoiser(pruning.denoiser)
    keep = read_keep(pruning.keep)
    module, start = prune(full_module, full, keep)
    if pruning.start:
        given, start = read_denoiser(pruning.start)
        _check_start(given, module, pruning)
    return Denoisers(full_module, full, module, start, keep, fingerprint(pruning.denoiser))


def abstract_denoisers(pruning: PruningConfig) -> Denoisers:
    """Return the networks as shapes, with the published sizes if no denoiser is named.

    Raises:
      InputError: as for `read_denoisers`, without the weights.
    """
    if pruning.denoiser:
        full_module, full = abstract_denoiser(pruning.denoiser)
    else:
        full_module = TeacherMMDiT(TEACHER)
        full = abstract_stacked(full_module)
    keep = read_keep(pruning.keep) if pruning.keep else PUBLISHED_KEEP
    check_keep(keep, full_module.config.num_layers)
    module = full_module.clone(config=dataclasses.replace(full_module.config, num_layers=len(keep)))
    if pruning.start:
        _check_start(checkpoint.load_module(pruning.start), module, pruning)
    return Denoisers(full_module, full, module, abstract_stacked(module), keep, 'abstract')


def _check_start(given: Any, module: AnyDenoiser, pruning: PruningConfig) -> None:
    """Raise InputError unless the sizes of a pruned denoiser match the keep list."""
    if (type(given), given.config) != (type(module), module.config):
        raise InputError(
            f'start {pruning.start} holds a {type(given).__name__} of {given.config.num_layers} blocks, the keep list '
            f'makes a {type(module).__name__} of {module.config.num_layers} of {pruning.denoiser}: give the denoiser '
            'and the keep list that it was made with.'
        )


class Pruning(TeacherTraining):
    """Program of both stages: the teacher's flow matching, with another loss in stage 2."""

    name = 'pruning'
    shown = ('loss', 'image', 'text', 'output', 'data')

    def __init__(
        self, pruning: PruningConfig, config: TeacherConfig, *data: Any, denoisers: Denoisers | None = None
    ) -> None:
        """Build the program.

        Args:
          data: as for `TeacherTraining`.
          denoisers: by default from `read_denoisers`.
        Raises:
          InputError: the denoisers cannot be read, or do not match each other or the samples.
        """
        denoisers = read_denoisers(pruning) if denoisers is None else denoisers
        super().__init__(config, *data, denoiser=(denoisers.module, denoisers.start))
        self.pruning, self.keep, self.fingerprint = pruning, denoisers.keep, denoisers.fingerprint
        self.full_module, self.full = self.module.clone(config=denoisers.full_module.config), denoisers.full

    def plain(self) -> Self:
        """Return the program without recomputation and padding, itself if it has none."""
        plain = super().plain()
        if plain is not self:
            plain.full_module = plain_denoiser(self.full_module)
        return plain

    def frozen(self) -> dict[str, Any]:
        """Return the initial parameters, and in stage 2 those of the teacher."""
        teacher = {'teacher': self.flat(self.full)} if self.pruning.stage == 2 else {}
        return super().frozen() | teacher

    def train_step(
        self, variant: tuple[int, ...], state: AveragedState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[AveragedState, dict[str, Array]]:
        """Run one update; arguments as for `TeacherTraining`."""
        if self.pruning.stage == 1:
            return super().train_step(variant, state, frozen, batch, key)
        batch = {name: batch[name] for name in ('latents', 'units') if name in batch} | self.prompts(batch)
        loss_of = functools.partial(self.matching, variant, frozen['teacher'])
        (loss, (parts, sums)), grads = value_and_grad(loss_of, state.params, batch, key, self.config.accumulate)
        metrics = {'loss': loss, 'grad_norm': optax.global_norm(grads)} | _metrics(parts, self.keep)
        for stage, values in sums.items():
            metrics |= flow_matching.unit_means(values, f'flow/stage{stage}')
        return state.updated(grads, self.tx, self.config.ema_decay), metrics

    def matching(
        self, stages: tuple[int, ...], teacher: Any, params: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[Float[Array, ''], tuple[dict[str, Array], dict[int, Float[Array, '2 T']]]]:
        """Return the loss of stage 2 (mean over the pyramid's stages), its parts, and the flow's sums by unit."""
        prompt, examples = self.examples(stages, batch, key)
        run_student = observer(functools.partial(self._featured, self.module), params)
        run_teacher = observer(functools.partial(self._featured, self.full_module), teacher)
        rows, sums = [], {}
        for stage, example in examples.items():
            flow, features = predict_flow(run_student, stage, example, prompt)
            teacher_flow, teacher_features = jax.lax.stop_gradient(predict_flow(run_teacher, stage, example, prompt))
            errors = losses.squared_error(flow, example.flow)
            image, text = block_errors(features, teacher_features, targets(self.keep, self.pruning.mapping))
            output = jnp.mean(losses.squared_error(flow, teacher_flow))
            rows.append({'image': image, 'text': text, 'output': output, 'data': jnp.mean(errors)})
            sums[stage] = flow_matching.unit_sums(errors, example.unit, batch['latents'].shape[1])
        parts = jax.tree.map(lambda *values: jnp.mean(jnp.stack(values), axis=0), *rows)
        config = self.pruning
        loss = config.image_weight * jnp.mean(parts['image']) + config.output_weight * parts['output']
        loss += config.data_weight * parts['data']
        if parts['text'].size:
            loss += config.text_weight * jnp.mean(parts['text'])
        return loss, (parts, sums)

    def _featured(self, module: Any, variables: Mapping[str, Any], *arguments: Any) -> Any:
        """Run a denoiser on parameters in the layout of the state; return its flow and its features."""
        return with_features(module)({'params': self.nested(variables['params'])}, *arguments)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the teacher's training and of the pruning."""
        options = {name: getattr(self.pruning, name) for name in ('stage', 'mapping', *WEIGHTS)}
        return super().metadata() | {'pruning': options | {'keep': list(self.keep), 'denoiser': self.fingerprint}}


def targets(keep: Sequence[int], mapping: str) -> list[int]:
    """Return for each kept block but the last the teacher's block whose output is its target."""
    return [after - 1 for after in keep[1:]] if mapping == 'next' else list(keep[:-1])


def block_errors(
    student: Features, teacher: Features, blocks: Sequence[int]
) -> tuple[Float[Array, ' K+1'], Float[Array, ' K']]:
    """Return the squared error on image tokens of every kept block, and the cosine distance on text tokens.

    Means over valid tokens. The last block has current image tokens only, and no text.

    Args:
      blocks: the teacher's block for each of the student's blocks but the last.
    """
    errors = jax.vmap(token_errors, in_axes=(0, 0, None))
    last, _ = token_errors(student.last, teacher.last, jnp.ones(student.last.shape[:2]))
    if not blocks:
        return last[None], jnp.zeros(0)
    image, text = (stream[np.asarray(blocks)] for stream in teacher.after)
    squares, _ = errors(student.after.image, image, student.image_mask)
    _, cosines = errors(student.after.text, text, student.text_mask)
    return jnp.append(squares, last), cosines


def _metrics(parts: Mapping[str, Array], keep: Sequence[int]) -> dict[str, Array]:
    """Return the parts of the loss as metrics; blocks are named by their indices in the full denoiser."""
    metrics = {'output': parts['output'], 'data': parts['data']}
    for stream in ('image', 'text'):
        if parts[stream].size:
            metrics[stream] = jnp.mean(parts[stream])
        metrics |= {f'{stream}/block{block}': value for block, value in zip(keep, parts[stream], strict=False)}
    return metrics


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of configs/pruning.py.

    Attributes:
      denoiser: component folder of the full denoiser.
      keep: blocks to keep, '0,1,2,4', or the keep.json of `train.prune`.
      start: component folder of the pruned denoiser to continue from; '' begins with the blocks of the full one.
      data: folders of train.latents, separated by commas.
      weights: share of each folder; () for equal ones.
      workdir: folder of the run.
      seed: seed of parameters, data order and all randomness in steps.
      blank_sample: sizes of a sample in a plan without data.
    """

    denoiser: PathText
    keep: str
    start: PathText
    data: str
    weights: tuple[float, ...]
    workdir: str
    seed: int
    pruning: PruningConfig
    flow: TeacherConfig
    blank_sample: BlankSample
    loop: LoopConfig


def load(settings: Settings) -> Training:
    """Return the training on folders of latents.

    Raises:
      InputError: the denoisers or the data cannot be read, or are incompatible.
    """
    folders = comma_list(settings.data)
    make = functools.partial(Pruning, settings.pruning)
    program, source = load_program(settings.flow, folders, settings.weights or [1.0] * len(folders), make)
    return Training(program, source, settings.loop)


def abstract(settings: Settings) -> Training:
    """Return the training as shapes, for a plan or for sizing, with the published sizes if no denoiser is named.

    Raises:
      InputError: the named folders and the keep list are incompatible.
    """
    denoisers = abstract_denoisers(settings.pruning)
    blank = blank_latents(settings.blank_sample, sized(settings.flow, denoisers.module))
    program = Pruning(settings.pruning, settings.flow, blank[0], denoisers=denoisers)
    return Training(program, blank, settings.loop)


REQUIRED = {'denoiser': 'FOLDER', 'keep': '0,1,2 or FILE.json', 'data': 'FOLDER', 'workdir': 'FOLDER'}
RECIPE = Recipe(Settings, load, abstract, REQUIRED)
