"""The models of the text-encoder distillation, read from folders or abstract, and the deployed adapter.

    teacher  t  = CE(T5-XXL(prompt)), CE the denoiser's context embedder, linear
    student  t' = CA(DT5(prompt))          'replace': the adapter replaces the embedder
             t' = CE(CA(DT5(prompt)))      'extend': the adapter precedes the embedder
             t' = CE(DT5(prompt))          'none': no adapter; only the encoder is trained

Each is deployed as an encoder and one context adapter: with 'extend' the adapter's last layer and the embedder become
one linear map; with 'none' the embedder is an adapter without hidden layers. Both are exact.

Source: Neodragon, arXiv 2511.06055, section on text-encoder distillation.
Legend: E width of T5-XXL's and DT5's states, D width of the denoiser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.checkpoint.params import is_sensitive, read_params
from neodragon_jax.config.neodragon import FULL, ContextAdapterConfig
from neodragon_jax.config.pyramid_flow import T5_XXL, TEACHER
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.t5 import T5Encoder, T5EncoderWithProjection
from neodragon_jax.models.teacher import TeacherMMDiT
from train.data import DTYPES

ADAPTERS = ('replace', 'extend', 'none')


@dataclasses.dataclass(frozen=True)
class TextParts:
    """The models before the distillation; parameters are host arrays, or abstract ones for a plan.

    Attributes:
      encoder, encoder_params: DT5 before the distillation.
      embedder_params: kernel [E, D] and bias [D] of CE.
      teacher, teacher_params: T5-XXL; None where the samples hold its states.
      start: parameters of an adapter to continue from, or None.
    """

    encoder: T5EncoderWithProjection
    encoder_params: Any
    embedder_params: Any
    teacher: T5Encoder | None = None
    teacher_params: Any = None
    start: Any = None

    def __post_init__(self) -> None:
        inputs = self.embedder_params['kernel'].shape[0]
        widths = {'the distilled encoder': self.encoder.config.out_dim}
        if self.teacher is not None:
            widths['the teacher encoder'] = self.teacher.config.d_model
        for name, width in widths.items():
            if width != inputs:
                raise InputError(
                    f"{name} gives states of width {width}, the denoiser's context embedder takes {inputs}; use the "
                    'parts of one system.'
                )


def read_parts(encoder: str, embedder: str, teacher: str, start: str, dtype: str) -> TextParts:
    """Read the models from component folders.

    Args:
      encoder: folder of DT5.
      embedder: folder of Pyramid-Flow's denoiser, for its context embedder.
      teacher: folder of T5-XXL; '' where the samples hold its states.
      start: folder of a context adapter to continue from; '' for a fresh one.
      dtype: storage type of T5-XXL.
    Raises:
      InputError: a folder is missing, damaged or of another kind.
    """
    parts = TextParts(
        encoder=checkpoint.load_module(encoder, T5EncoderWithProjection),
        encoder_params=_as_float32(read_params(encoder, None)),
        embedder_params=_embedder(embedder),
    )
    if teacher:
        read = {
            'teacher': checkpoint.load_module(teacher, T5Encoder),
            'teacher_params': read_params(teacher, DTYPES[dtype]),
        }
        parts = dataclasses.replace(parts, **read)
    if start:
        checkpoint.load_module(start, ContextAdapter)
        parts = dataclasses.replace(parts, start=_as_float32(read_params(start, None)))
    return parts


def abstract_parts(cached: bool, dtype: str) -> TextParts:
    """Return the models at full size as shapes."""
    encoder, teacher = T5EncoderWithProjection(FULL.t5), T5Encoder(T5_XXL)
    shape = (TEACHER.joint_attention_dim, TEACHER.width)
    embedder = {name: jax.ShapeDtypeStruct(dims, np.float32) for name, dims in (('kernel', shape), ('bias', shape[1:]))}
    if cached:
        return TextParts(encoder, held(encoder, np.float32), embedder)
    return TextParts(encoder, held(encoder, np.float32), embedder, teacher, held(teacher, DTYPES[dtype]))


def sized_parts(published: TextParts, folders: Mapping[str, Any], dtype: str) -> TextParts:
    """Return abstract models, with the stored sizes where a folder is named.

    Args:
      published: the models without a folder.
      folders: encoder, embedder, teacher and start, '' for none, see configs/text.py.
      dtype: storage type of T5-XXL.
    Raises:
      InputError: a folder is missing, damaged or of another kind, or does not fit the others.
    """
    kinds = {
        'encoder': T5EncoderWithProjection,
        'embedder': TeacherMMDiT,
        'teacher': T5Encoder,
        'start': ContextAdapter,
    }
    modules = {name: checkpoint.load_module(folders[name], kind) for name, kind in kinds.items() if folders[name]}
    changes: dict[str, Any] = {name: modules[name] for name in ('encoder', 'teacher') if name in modules}
    if 'encoder' in modules:
        changes['encoder_params'] = held(modules['encoder'], np.float32)
    if 'embedder' in modules:
        changes['embedder_params'] = held(modules['embedder'], np.float32)['context_embedder']
    if 'teacher' in modules:
        changes['teacher_params'] = held(modules['teacher'], DTYPES[dtype])
    if 'start' in modules:
        changes['start'] = held(modules['start'], np.float32)
    return dataclasses.replace(published, **changes)


def held(module: Any, dtype: Any) -> Any:
    """Return a module's parameters as shapes, in their storage types.

    Args:
      dtype: storage type of all parameters that are not precision-sensitive, see `params.is_sensitive`.
    """

    def leaf_of(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        kept = is_sensitive(tuple(key.key for key in path), leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else dtype)

    return jax.tree_util.tree_map_with_path(leaf_of, abstract_params(module))


def adapter_config(kind: str, parts: TextParts, hidden: tuple[int, ...]) -> ContextAdapterConfig | None:
    """Return the sizes of the trained adapter, or None if there is none."""
    if kind == 'none':
        return None
    inputs, outputs = parts.embedder_params['kernel'].shape
    return ContextAdapterConfig(
        input_dims=parts.encoder.config.out_dim,
        output_dims=outputs if kind == 'replace' else inputs,
        layer_depths=hidden,
        skips=(True,) * len(hidden),
    )


def deployed_adapter(
    kind: str, adapter: ContextAdapter | None, params: Mapping[str, Any], embedder: Mapping[str, Any]
) -> tuple[ContextAdapter, dict[str, Any]]:
    """Return the context adapter that equals adapter and embedder in sequence.

    Args:
      params: parameters of the adapter; host arrays, like those of `embedder`.
    """
    if kind == 'replace':
        assert adapter is not None
        return adapter, dict(params)
    inputs, outputs = embedder['kernel'].shape
    if adapter is None:
        config = ContextAdapterConfig(input_dims=inputs, output_dims=outputs, layer_depths=(), skips=())
        return ContextAdapter(config), {'layer_0': dict(embedder)}
    last = f'layer_{len(adapter.config.layer_depths)}'
    config = dataclasses.replace(adapter.config, output_dims=outputs)
    return ContextAdapter(config), {**params, last: _folded(params[last], embedder)}


def _folded(layer: Mapping[str, Any], embedder: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dense layer that equals a layer and the embedder in sequence, computed in float64."""
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in embedder.items()}
    kernel, bias = (np.asarray(layer[name], np.float64) for name in ('kernel', 'bias'))
    folded = {'kernel': kernel @ wide['kernel'], 'bias': bias @ wide['kernel'] + wide['bias']}
    return {name: leaf.astype(np.float32) for name, leaf in folded.items()}


def _embedder(folder: str) -> dict[str, Any]:
    """Return the context embedder's parameters in float32."""
    checkpoint.load_module(folder, TeacherMMDiT)
    return _as_float32(read_params(folder, None, 'context_embedder'))['context_embedder']


def _as_float32(params: Any) -> Any:
    """Return host arrays in float32."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, jnp.float32), params)
