"""Load and save component folders of the released layout.

A component folder holds `config.json` (its class under `_class_name` or `architectures`) and safetensors weights.
Source: the released checkpoint of Neodragon (arXiv 2511.06055), a Hugging Face folder of such components.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar, overload

import flax.linen as nn
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import is_there
from neodragon_jax.base.json_file import read_json, shown
from neodragon_jax.base.paths import input_path, user_path
from neodragon_jax.checkpoint import shipped
from neodragon_jax.checkpoint.classes import COMPONENTS, class_name, class_names
from neodragon_jax.checkpoint.shape_cache import released_shapes
from neodragon_jax.checkpoint.weights import Weights, remove_other_sets
from neodragon_jax.config.neodragon import (
    ComponentConfig,
)
from neodragon_jax.models.mmdit import PyramidMMDiT, unstack_blocks
from neodragon_jax.models.teacher import TeacherMMDiT

Params = dict[str, Any]
Path = str | os.PathLike[str]
MAX_CONFIG_BYTES = 2**20
M = TypeVar('M', bound=nn.Module)


@overload
def load_module(folder: Path) -> nn.Module: ...
@overload
def load_module(folder: Path, *kinds: type[M]) -> M: ...
def load_module(folder: Path, *kinds: type[Any]) -> Any:
    """Return the module of a component folder, with its sizes from `config.json`; no weights are read.

    Args:
      kinds: accepted module classes, subclasses included; none accepts every class.
    Raises:
      InputError: the folder or its config are missing or damaged, or it holds another class.
    """
    folder = input_path(folder, 'component folder')
    name, config = _read_config(folder)
    module = COMPONENTS[name].build(config)
    if kinds and not isinstance(module, kinds):
        wanted = [name for kind in kinds for name in class_names(kind)]
        raise InputError(f'{folder}: holds {_article(name)}; pass the folder of {_article(" or ".join(wanted))}.')
    return module


def _article(noun: str) -> str:
    """Return a class name with its indefinite article."""
    return f'{"an" if noun[0] in "AEIO" else "a"} {noun}'


@overload
def load(folder: Path) -> tuple[nn.Module, Params]: ...
@overload
def load(folder: Path, *kinds: type[M]) -> tuple[M, Params]: ...
def load(folder: Path, *kinds: type[Any]) -> tuple[Any, Params]:
    """Load one component folder.

    Args:
      kinds: accepted module classes, subclasses included; none accepts every class.
    Returns:
      (module, params): the Flax module with its sizes from `config.json`, and its parameters as NumPy arrays in the
      stored types; `module.apply({'params': params}, ...)` runs it.
    Raises:
      InputError: the folder, its config or its weights are missing or damaged, or it holds another class.
    """
    folder = input_path(folder, 'component folder')
    module = load_module(folder, *kinds)
    entries = {entry.torch_name: entry for entry in COMPONENTS[class_name(module)].entries(module.config)}
    weights = open_weights(folder, module)
    params = {entries[name].path: entries[name].convert.to_flax(tensor) for name, tensor in weights.read(entries)}
    return module, traverse_util.unflatten_dict(params)


def open_weights(folder: Path, module: nn.Module) -> Weights:
    """Check the names, shapes and types in the headers of a component's weight files; return the tensors.

    Raises:
      InputError: a file is missing or damaged, or its tensors are not those of the module.
    """
    folder = input_path(folder, 'component folder')
    weights, component = Weights(folder), COMPONENTS[class_name(module)]
    config: Any = module.config  # pyright: ignore[reportAttributeAccessIssue]
    # Names first: the shapes require tracing all layers that the config declares.
    weights.check_names(entry.torch_name for entry in component.entries(config))
    weights.check(released_shapes(class_name(module), config))
    return weights


def save(folder: Path, module: nn.Module, params: Mapping[str, Any]) -> None:
    """Write a component folder that both `load` and the reference implementation can read.

    Loading a folder and saving it again gives the same tensors under the same names, byte for byte. Each file is
    renamed into place only when it is complete.

    Args:
      folder: created if absent; an older component in it is replaced.
      params: in the unrolled or the scanned form, according to `module.scan`.
    Raises:
      InputError: the module is not a released component, or has no parameter of that name.
    """
    folder = user_path(folder, 'component folder')
    name = class_name(module)
    component, config = COMPONENTS[name], module.config  # pyright: ignore[reportAttributeAccessIssue]
    flat = traverse_util.flatten_dict(_unrolled(module, params))
    entries = component.entries(config)
    unknown = set(flat) - {entry.path for entry in entries}
    if unknown:
        raise InputError(
            f'cannot save {"/".join(min(unknown))}: {name} has no such parameter; pass the module that made it.'
        )
    tensors = {entry.torch_name: np.ascontiguousarray(entry.convert.to_torch(flat[entry.path])) for entry in entries}
    label = {'architectures': [name]} if component.transformers else {'_class_name': name}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / component.weight_file) as path:
        safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})
    with atomic_file(folder / 'config.json') as path:
        path.write_text(json.dumps(label | config.to_json(), indent=2) + '\n')
    remove_other_sets(folder, component.weight_file)


def _unrolled(module: nn.Module, params: Mapping[str, Any]) -> Params:
    """Return the parameters of a denoiser or a teacher in the unrolled form; return others unchanged."""
    if isinstance(module, PyramidMMDiT) and module.scan:
        return unstack_blocks(dict(params), module.config.num_layers)
    if isinstance(module, TeacherMMDiT) and module.scan:
        return {**params, 'denoiser': unstack_blocks(params['denoiser'], module.config.num_layers)}
    return dict(params)


def component_folder(root: Path, name: str) -> pathlib.Path:
    """Return the folder of a component in a checkpoint; from the hub, only this component is downloaded.

    Args:
      root: a folder or a name, see `shipped.find`.
    Raises:
      InputError: the checkpoint or the component does not exist.
    """
    root = shipped.find(root, [name], 'checkpoint')
    if not (is_there(root / name) and (root / name).is_dir()):
        raise InputError(
            f'{root}: no component "{name}" in it. Pass the root of the released checkpoint, or complete it.'
        )
    return root / name


def _read_config(folder: pathlib.Path) -> tuple[str, ComponentConfig]:
    """Return the class and the sizes in a folder's `config.json`."""
    path = folder / 'config.json'
    if not folder.is_dir():
        raise InputError(
            f'{folder}: no such folder. Pass the folder of one component, such as CHECKPOINT/context_adapter.'
        )
    if not (is_there(path) and path.is_file()):
        inside = sorted(child.name for child in folder.iterdir() if (child / 'config.json').is_file())
        hint = f'It holds components; pass one of them: {", ".join(inside)}.' if inside else 'Copy the folder again.'
        raise InputError(f'{folder}: no config.json in it. {hint}')
    values = read_json(path, dict[str, Any], max_bytes=MAX_CONFIG_BYTES)
    declared = values.get('_class_name', values.get('architectures'))
    name = declared[0] if isinstance(declared, list) and declared else declared
    if not isinstance(name, str) or name not in COMPONENTS:
        raise InputError(f'{path}: class {shown(name)} is not supported; expected one of {", ".join(COMPONENTS)}.')
    return name, COMPONENTS[name].config.from_json(values, str(path))
