"""The models of the text-encoder distillation as shapes, for plans and for sizing, with the sizes of stored ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.t5 import T5Encoder, T5EncoderWithProjection
from neodragon_jax.models.teacher import TeacherMMDiT
from train.data import DTYPES
from train.text.parts import TextParts, held, open_module


def sized_parts(published: TextParts, folders: Mapping[str, Any], dtype: str) -> TextParts:
    """Return abstract models, of which those whose folders are named have the sizes that are stored there.

    Args:
      published: for the others.
      folders: encoder, embedder, teacher and start, '' for none, see configs/text.py.
      dtype: in which T5-XXL is held.
    Raises:
      InputError: a folder is missing, damaged or of another kind, or does not fit the others.
    """
    kinds = {
        'encoder': T5EncoderWithProjection,
        'embedder': TeacherMMDiT,
        'teacher': T5Encoder,
        'start': ContextAdapter,
    }
    modules = {name: open_module(folders[name], kind) for name, kind in kinds.items() if folders[name]}
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
