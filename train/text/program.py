"""Text-encoder distillation: trains DT5 and a context adapter to reproduce T5-XXL's embeddings, from prompts alone.

    python -m train.text --config=configs/text.py --config.data=PROMPTS --config.workdir=DIR

    t    = CE(T5-XXL(prompt)), the text input of the denoiser; CE is its frozen context embedder
    t'   = the student's embedding from DT5; parts.py lists the three modes of the adapter
    loss = mse_weight || t - t' ||^2 + cosine_weight (1 - cos(t, t')), means over the valid tokens

DT5 is frozen, trained, or trained by low-rank updates. T5-XXL runs in every step, split over the mesh, unless the
samples hold its states.

Source: Neodragon, arXiv 2511.06055, section on text-encoder distillation.
Legend: B batch, L text tokens, E width of T5-XXL's and DT5's states, D width of the denoiser, V held-out prompts.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import example_inputs
from neodragon_jax.checkpoint.folders import T5 as ENCODER
from neodragon_jax.checkpoint.folders import TEACHER_ADAPTER
from neodragon_jax.models.context_adapter import ContextAdapter
from train.data import DTYPES, SampleSource
from train.data.record_spec import T5_STATES
from train.data.sources import Repeated, hold_out, stacked
from train.runtime.optimizer import AveragedState, make_optimizer
from train.runtime.program import LoopConfig
from train.runtime.runner import Recipe, Training
from train.runtime.settings import PathText
from train.runtime.sharding import place, to_host
from train.text import losses
from train.text.config import TextConfig
from train.text.lora import named_tensors
from train.text.parts import (
    TextParts,
    abstract_parts,
    adapter_config,
    deployed_adapter,
    read_parts,
    sized_parts,
)
from train.text.retrieval import retrieval

# Names of the samples' arrays: token ids and their mask, and T5-XXL's states where they are stored.
IDS, MASK = 'ids', 'text_mask'
LORA_FILE = 'text_encoder_3_lora.safetensors'
# Prompts whose tokens are compared with the encoders' vocabularies before the training.
TRIED_PROMPTS = 256
# Quantile of the held-out tokens' cosine distances that the evaluation reports.
WORST = 0.99


class TextDistillation:
    """Program of the text-encoder distillation for the training loop."""

    name = 'text'
    shown = ('loss', 'embedding_mse', 'cosine_distance')

    def __init__(
        self,
        config: TextConfig,
        parts: TextParts,
        held_out: Mapping[str, np.ndarray] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the student from the models.

        Args:
          held_out: prompts to evaluate on, with a leading axis; None turns the evaluation off.
          data: JSON that identifies the samples and that a resumed run must share.
        """
        self.config, self.parts, self.held_out, self.data = config, parts, held_out, dict(data or {})
        dtype = DTYPES[config.dtype]
        self.encoder = parts.encoder.clone(dtype=dtype)
        self.teacher = None if parts.teacher is None else parts.teacher.clone(dtype=dtype)
        sizes = adapter_config(config.adapter, parts, config.hidden)
        self.adapter = None if sizes is None else ContextAdapter(sizes, dtype)
        self.tx, self._pooled = make_optimizer(config.optimizer), jax.jit(self._pooled_pair)

    def frozen(self) -> dict[str, Any]:
        """Return the parameters of the models before the distillation."""
        parts = self.parts
        given = {'embedder': parts.embedder_params, 'encoder': parts.encoder_params}
        optional = {'teacher': parts.teacher_params, 'start': parts.start}
        return given | {name: params for name, params in optional.items() if params is not None}

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> AveragedState:
        """Return the state before the first step."""
        adapter_key, lora_key = jax.random.split(key)
        params: dict[str, Any] = {}
        if 'start' in frozen:
            params['adapter'] = jax.tree.map(jnp.copy, frozen['start'])
        elif self.adapter is not None:
            params['adapter'] = self.adapter.init(adapter_key, *example_inputs(self.adapter))['params']
        if self.config.encoder == 'trained':
            params['encoder'] = jax.tree.map(jnp.copy, frozen['encoder'])
        if self.config.encoder == 'lora':
            params['lora'] = self.config.lora.init(lora_key, frozen['encoder'])
        return AveragedState.begin(params, self.tx, ema_decay=0.0)

    def variant(self, step: int) -> int:
        """Return the only kind of step."""
        del step
        return 0

    def train_step(
        self, variant: int, state: AveragedState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[AveragedState, dict[str, Array]]:
        """Run one update.

        Args:
          batch: ids and text_mask [B, L]; t5 [B, L, E] where there is no teacher encoder.
        """
        del variant
        target = jax.lax.stop_gradient(self.target(frozen, batch))

        def loss_of(params: Any) -> tuple[Float[Array, ''], dict[str, Array]]:
            states = self.embed(params, frozen, batch, key if self.config.encoder != 'frozen' else None)
            square, cosine = losses.token_errors(states, target, batch[MASK])
            loss = self.config.mse_weight * square + self.config.cosine_weight * cosine
            return loss, {'loss': loss, 'embedding_mse': square, 'cosine_distance': cosine}

        (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        metrics |= {'grad_norm': optax.global_norm(grads)}
        return state.updated(grads, self.tx, ema_decay=0.0), metrics

    def target(self, frozen: Any, batch: Mapping[str, Array]) -> Float[Array, 'B L D']:
        """Return t, the teacher's embedding, in float32."""
        if self.teacher is None:
            return embed_states(frozen['embedder'], batch[T5_STATES])
        states = self.teacher.apply({'params': frozen['teacher']}, batch[IDS], batch[MASK])
        return embed_states(frozen['embedder'], states)  # pyright: ignore[reportArgumentType]

    def embed(
        self, params: Any, frozen: Any, batch: Mapping[str, Array], dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, 'B L D']:
        """Return t', the student's embedding; with a key, dropout is applied as in training."""
        rngs = None if dropout_key is None else {'dropout': dropout_key}
        variables = {'params': self.encoder_params(params, frozen['encoder'])}
        states: Any = self.encoder.apply(variables, batch[IDS], batch[MASK], dropout_key is None, rngs=rngs)
        if self.adapter is not None:
            states = self.adapter.apply({'params': params['adapter']}, states)
        return states if self.config.adapter == 'replace' else embed_states(frozen['embedder'], states)

    def encoder_params(self, params: Any, given: Any) -> Any:
        """Return DT5's parameters with the training so far."""
        if self.config.encoder == 'lora':
            return self.config.lora.merge(given, params['lora'])
        return params.get('encoder', given)

    def evaluate(self, state: AveragedState, frozen: Any, folder: pathlib.Path) -> dict[str, float]:
        """Return losses and retrieval metrics on the held-out prompts."""
        del folder
        if self.held_out is None:
            return {}
        pairs, errors, cosines = [], [], []
        for start in range(0, self.config.held_out, self.config.held_out_batch):
            rows = slice(start, start + self.config.held_out_batch)
            batch = place({name: array[rows] for name, array in self.held_out.items()}, state.params)
            *pair, terms, by_token = to_host(self._pooled(state.params, frozen, batch))
            pairs.append(pair)
            errors.append(terms)
            cosines.append(by_token[np.asarray(self.held_out[MASK][rows]) != 0])
        student, teacher = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        square, cosine = np.mean(errors, axis=0)
        worst = np.quantile(np.concatenate(cosines), WORST)
        means = {'embedding_mse': float(square), 'cosine_distance': float(cosine), 'cosine_distance/p99': float(worst)}
        return means | retrieval(student, teacher)

    def _pooled_pair(self, params: Any, frozen: Any, batch: Mapping[str, Array]) -> tuple[Array, Array, Array, Array]:
        """Return t' and t, means over the valid tokens; the loss's two terms; and 1 - cos(t, t') of every token."""
        student, teacher = self.embed(params, frozen, batch), self.target(frozen, batch)
        terms = jnp.stack(losses.token_errors(student, teacher, batch[MASK]))
        _, cosines = losses.errors_by_token(student, teacher)
        return mean_of_tokens(student, batch[MASK]), mean_of_tokens(teacher, batch[MASK]), terms, cosines

    def finish(self, state: AveragedState, folder: pathlib.Path) -> None:
        """Write the deployed models in the released layout, and `text.json`.

        `context_adapter_multistep_t2v` is always written; `text_encoder_3` if it changed. Low-rank updates are merged,
        and also stored separately. With adapter 'extend', `extending_adapter` is the adapter before the merge with the
        embedder.
        """
        params, step = to_host((state.params, state.step))
        if jax.process_index() != 0:
            return
        kind, embedder = self.config.adapter, self.parts.embedder_params
        adapter = deployed_adapter(kind, self.adapter, params.get('adapter', {}), embedder)
        checkpoint.save(folder / TEACHER_ADAPTER, *adapter)
        if kind == 'extend':
            assert self.adapter is not None
            checkpoint.save(folder / 'extending_adapter', self.adapter, params['adapter'])
        if self.config.encoder != 'frozen':
            encoder = self.encoder_params(params, self.parts.encoder_params)
            checkpoint.save(folder / ENCODER, self.encoder, jax.tree.map(np.asarray, encoder))
        if 'lora' in params:
            tensors = {name: np.ascontiguousarray(leaf) for name, leaf in named_tensors(params['lora']).items()}
            with atomic_file(folder / LORA_FILE) as path:
                safetensors.numpy.save_file(tensors, path)
        with atomic_file(folder / 'text.json') as path:
            path.write_text(json.dumps(self.metadata() | {'iterations': int(step)}, indent=2) + '\n')

    def metadata(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share: models, objective and data, but not learning rates."""
        config = dataclasses.asdict(self.config)
        for name in ('optimizer', 'dtype', 'held_out_batch'):
            del config[name]
        if self.config.encoder != 'lora':
            del config['lora']
        return config | {'encoder_sizes': self.encoder.config.to_json(), 'data': self.data}


def embed_states(embedder: Mapping[str, Array], states: Float[Array, 'B L E']) -> Float[Array, 'B L D']:
    """Return CE(states), in float32."""
    return states.astype(jnp.float32) @ embedder['kernel'].astype(jnp.float32) + embedder['bias']


def mean_of_tokens(states: Float[Array, 'B L D'], mask: Array) -> Float[Array, 'B D']:
    """Return the mean over valid tokens, in float32."""
    weights = (mask != 0).astype(jnp.float32)
    weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)
    return jnp.einsum('bl,bld->bd', weights, states.astype(jnp.float32))


def blank_prompts(tokens: int, states: int | None) -> Repeated:
    """Return samples with `tokens` ids, for a plan without data; with text states if their width `states` is given."""
    sample: dict[str, Any] = {name: np.ones(tokens, np.int32) for name in (IDS, MASK)}
    if states is not None:
        sample[T5_STATES] = np.zeros((tokens, states), DTYPES['bfloat16'])
    return Repeated(sample, 2**20)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of configs/text.py.

    Attributes:
      data: folder of train.prompts or train.text_states.
      workdir: folder of the run.
      seed: seed of parameters, data order and all randomness in steps.
      encoder: component folder of DT5.
      embedder: component folder of Pyramid-Flow's denoiser, whose embedding of the text states is the target's.
      teacher: component folder of T5-XXL; '' where the samples hold its states.
      start: component folder of a context adapter to continue from; '' begins with fresh parameters.
      text_tokens: tokens of a prompt, in a plan without data.
      cached: whether samples hold T5-XXL's states, in a plan without data.
    """

    data: str
    workdir: str
    encoder: PathText
    embedder: PathText
    teacher: PathText
    start: PathText
    seed: int
    text: TextConfig
    loop: LoopConfig
    text_tokens: int
    cached: bool

    @property
    def folders(self) -> dict[str, str]:
        """Return the component folders by role; '' for none."""
        return {name: getattr(self, name) for name in ('encoder', 'embedder', 'teacher', 'start')}


def load(settings: Settings) -> Training:
    """Return the distillation on stored prompts.

    Raises:
      InputError: a folder is missing or does not fit the others.
    """
    config, source = settings.text, SampleSource(settings.data)
    needed = (IDS, MASK) if settings.teacher else (IDS, MASK, T5_STATES)
    for name in needed:
        if name not in source.spec.arrays:
            writer = 'train.prompts' if name != T5_STATES else 'train.text_states, or set config.teacher'
            raise InputError(f'{settings.data}: its samples have no {name}; pass a folder of {writer}.')
    training, held_out = hold_out(source, config.held_out, setting=f'config.text.held_out, {settings.data}')
    parts = read_parts(**settings.folders, dtype=config.dtype)
    _check_vocabulary(source, settings, parts)
    rows = {name: array for name, array in stacked(held_out).items() if name in needed} if config.held_out else None
    data = {'protocol': source.protocol, 'cached': not settings.teacher}
    return Training(TextDistillation(config, parts, rows, data), training, settings.loop)


def abstract(settings: Settings) -> Training:
    """Return the distillation as shapes, for a plan or for sizing.

    Models have the sizes of the named folders, or the published sizes without a folder.

    Raises:
      InputError: a folder cannot be read or does not fit the others.
    """
    config = settings.text
    published = abstract_parts(settings.cached and not settings.teacher, config.dtype)
    parts = sized_parts(published, settings.folders, config.dtype)
    states = parts.encoder.config.out_dim if parts.teacher is None else None
    return Training(TextDistillation(config, parts), blank_prompts(settings.text_tokens, states), settings.loop)


def _check_vocabulary(source: SampleSource, settings: Settings, parts: TextParts) -> None:
    """Raise InputError if a token of the first prompts has no embedding in an encoder that reads it."""
    rows = [source[index][IDS] for index in range(min(len(source), TRIED_PROMPTS))]
    highest = max(int(np.max(row)) for row in rows)
    for name, module in (('encoder', parts.encoder), ('teacher', parts.teacher)):
        if module is not None and highest >= module.config.vocab_size:
            raise InputError(
                f'{settings.data}: its prompts have tokens up to number {highest}, but config.{name} '
                f'{settings.folders[name]} has embeddings of {module.config.vocab_size} tokens: make the prompts with '
                'train.prompts and the tokenizer of this encoder.'
            )


REQUIRED = {name: 'FOLDER' for name in ('encoder', 'embedder', 'data', 'workdir')}
RECIPE = Recipe(Settings, load, abstract, REQUIRED)
