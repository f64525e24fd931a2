"""Load and save component folders of the released layout, and native Orbax checkpoints.

A component folder holds `config.json` (its class under `_class_name` or `architectures`) and safetensors weights.
Source: the released checkpoint of Neodragon (arXiv 2511.06055), a Hugging Face folder of such components.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from flax import traverse_util

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.names.convert import Entry
from neodragon_jax.checkpoint.names.mmdit import mmdit_names, teacher_names
from neodragon_jax.checkpoint.names.native_vae import native_vae_names
from neodragon_jax.checkpoint.names.safety_checker import safety_checker_names
from neodragon_jax.checkpoint.names.sdxl import image_vae_names, unet_names
from neodragon_jax.checkpoint.names.super_resolution import super_resolution_names
from neodragon_jax.checkpoint.names.text import (
    T5_TIED_NAMES,
    clip_names,
    context_adapter_names,
    t5_encoder_names,
    t5_names,
)
from neodragon_jax.checkpoint.names.vae import video_vae_names
from neodragon_jax.config.neodragon import (
    CLIPTextConfig,
    ComponentConfig,
    ContextAdapterConfig,
    MMDiTConfig,
    T5Config,
    T5EncoderConfig,
    VideoVAEConfig,
)
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig, TeacherMMDiTConfig
from neodragon_jax.config.safety_checker import SafetyCheckerConfig
from neodragon_jax.config.sdxl import SIZE_IDS, ImageVAEConfig, UNetConfig
from neodragon_jax.config.super_resolution import SuperResolutionConfig
from neodragon_jax.models.clip import CLIPTextModel
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.mmdit import PyramidMMDiT, unstack_blocks
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.safety_checker import StableDiffusionSafetyChecker
from neodragon_jax.models.sdxl_unet import UNet2DConditionModel
from neodragon_jax.models.sdxl_vae import AutoencoderKL
from neodragon_jax.models.super_resolution import QuickSRNet
from neodragon_jax.models.t5 import T5Encoder, T5EncoderWithProjection
from neodragon_jax.models.teacher import TeacherMMDiT
from neodragon_jax.models.vae import CausalVAE, VideoVAE

Params = dict[str, Any]
Path = str | os.PathLike[str]

# Tensors that some files hold and that say nothing: a second name of a tied weight, and a constant 0, 1, 2, ... that
# old versions of transformers stored. They are not written back.
REDUNDANT = {
    *T5_TIED_NAMES,
    'text_model.embeddings.position_ids',
    'vision_model.vision_model.embeddings.position_ids',
}

WEIGHT_FILES = ('diffusion_pytorch_model.safetensors', 'model.safetensors')


@dataclasses.dataclass(frozen=True)
class Component:
    """How a released class maps to ours."""

    config: type[ComponentConfig]
    build: Callable[..., nn.Module]
    names: Callable[..., list[Entry]]
    weight_file: str = WEIGHT_FILES[0]
    # Transformers writes the class as a list under `architectures`, diffusers under `_class_name`.
    transformers: bool = False


def _clip(projection: bool) -> Component:
    return Component(
        CLIPTextConfig,
        lambda config: CLIPTextModel(config, projection=projection),
        lambda config: clip_names(config, projection=projection),
        WEIGHT_FILES[1],
        transformers=True,
    )


COMPONENTS: dict[str, Component] = {
    'PyramidMMDiT': Component(MMDiTConfig, PyramidMMDiT, mmdit_names),
    'ContextAdapter': Component(ContextAdapterConfig, ContextAdapter, context_adapter_names),
    'AsymmetricCausalVideoVAE': Component(VideoVAEConfig, VideoVAE, video_vae_names),
    'T5EncoderWithProjection': Component(
        T5Config, T5EncoderWithProjection, t5_names, WEIGHT_FILES[1], transformers=True
    ),
    'CLIPTextModel': _clip(projection=False),
    'CLIPTextModelWithProjection': _clip(projection=True),
    'UNet2DConditionModel': Component(UNetConfig, UNet2DConditionModel, unet_names),
    'AutoencoderKL': Component(ImageVAEConfig, AutoencoderKL, image_vae_names),
    'QuickSRNet': Component(SuperResolutionConfig, QuickSRNet, super_resolution_names),
    'StableDiffusionSafetyChecker': Component(
        SafetyCheckerConfig, StableDiffusionSafetyChecker, safety_checker_names, WEIGHT_FILES[1], transformers=True
    ),
    # The teacher's components, as Pyramid-Flow released them.
    'PyramidDiffusionMMDiT': Component(TeacherMMDiTConfig, TeacherMMDiT, teacher_names),
    'CausalVideoVAE': Component(PyramidFlowVAEConfig, NativeVAE, native_vae_names),
    'T5EncoderModel': Component(T5EncoderConfig, T5Encoder, t5_encoder_names, WEIGHT_FILES[1], transformers=True),
}

# Modules that do not have the name of their released class.
RELEASED_NAMES: dict[type[nn.Module], str] = {
    VideoVAE: 'AsymmetricCausalVideoVAE',
    NativeVAE: 'CausalVideoVAE',
    TeacherMMDiT: 'PyramidDiffusionMMDiT',
    T5Encoder: 'T5EncoderModel',
}


def load_module(folder: Path) -> nn.Module:
    """Return the module of a component folder, with its sizes from `config.json`; no weights are read.

    Raises:
      InputError: the folder or its config are missing, damaged or of another architecture.
    """
    component, config = _read_config(pathlib.Path(folder))
    return component.build(config)


def load(folder: Path) -> tuple[nn.Module, Params]:
    """Load one component folder.

    Returns:
      (module, params): the Flax module with its sizes from `config.json`, and its parameters as NumPy arrays in the
      stored types; `module.apply({'params': params}, ...)` runs it.
    Raises:
      InputError: the folder, its config or its weights are missing, damaged or of another architecture.
    """
    folder = pathlib.Path(folder)
    component, config = _read_config(folder)
    entries = component.names(config)
    module = component.build(config)
    params = _read_weights(folder, entries)
    _check_shapes(folder, module, params, entries)
    return module, params


def save(folder: Path, module: nn.Module, params: Mapping[str, Any]) -> None:
    """Write a component folder that the reference implementation and `load` read.

    Loading a folder and saving it again gives the same tensors under the same names, byte for byte. Each file appears
    under its name only when it is complete.

    Args:
      folder: made if absent; an older component in it is replaced.
      params: of the unrolled or the scanned form, as the module says.
    """
    folder = pathlib.Path(folder)
    name = class_name(module)
    component, config = COMPONENTS[name], module.config  # pyright: ignore[reportAttributeAccessIssue]
    flat = traverse_util.flatten_dict(_unrolled(module, params))
    entries = component.names(config)
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


def _unrolled(module: nn.Module, params: Mapping[str, Any]) -> Params:
    """Return the parameters of a denoiser, or of a teacher around one, in the unrolled form; others as they are."""
    if isinstance(module, PyramidMMDiT) and module.scan:
        return unstack_blocks(dict(params), module.config.num_layers)
    if isinstance(module, TeacherMMDiT) and module.scan:
        return {**params, 'denoiser': unstack_blocks(params['denoiser'], module.config.num_layers)}
    return dict(params)


def class_name(module: nn.Module) -> str:
    """Return the released class name of a module.

    Raises:
      InputError: the module is not one of the released components.
    """
    if isinstance(module, CLIPTextModel):
        return 'CLIPTextModelWithProjection' if module.projection else 'CLIPTextModel'
    name = RELEASED_NAMES.get(type(module), type(module).__name__)
    if name not in COMPONENTS:
        raise InputError(f'{name} is not a released component; use one of {", ".join(COMPONENTS)}.')
    return name


def abstract(module_class: str, config: ComponentConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return released name -> shape of every tensor of a component, without allocating it."""
    component = COMPONENTS[module_class]
    module = component.build(config)
    flat = traverse_util.flatten_dict(abstract_params(module))
    return {
        entry.torch_name: jax.eval_shape(entry.convert.to_torch, flat[entry.path]) for entry in component.names(config)
    }


def abstract_params(module: nn.Module) -> Params:
    """Return the shapes and types of a module's parameters, without allocating them."""
    return jax.eval_shape(lambda key: module.init(key, *example_inputs(module)), jax.random.key(0))['params']


def example_inputs(module: nn.Module) -> tuple[Any, ...]:
    """Return the smallest inputs that initialize every parameter of a module."""
    ids = jnp.zeros((1, 2), jnp.int32)
    if isinstance(module, PyramidMMDiT | TeacherMMDiT):
        config, patch = module.config, module.config.patch_size
        clips = [jnp.zeros((1, 1, patch, patch, config.in_channels))]
        text_width = config.width if isinstance(module, PyramidMMDiT) else config.joint_attention_dim
        text, pooled = jnp.zeros((1, 2, text_width)), jnp.zeros((1, config.pooled_projection_dim))
        return clips, text, ids, pooled, jnp.zeros(1)
    if isinstance(module, ContextAdapter):
        return (jnp.zeros((1, module.config.input_dims)),)
    if isinstance(module, CausalVAE):
        config = module.config
        side = 2 ** sum(config.encoder_spatial_down_sample)
        return (jnp.zeros((1, 1, side, side, config.encoder_in_channels)),)
    if isinstance(module, UNet2DConditionModel):
        config, side = module.config, 2 ** (len(module.config.block_out_channels) - 1)
        text, pooled = jnp.zeros((1, 2, config.cross_attention_dim)), jnp.zeros((1, config.pooled_dim))
        return jnp.zeros((1, side, side, config.in_channels)), jnp.zeros(1), text, pooled, jnp.zeros((1, SIZE_IDS))
    if isinstance(module, AutoencoderKL):
        side = module.config.spatial_factor
        return (jnp.zeros((1, side, side, module.config.in_channels)),)
    if isinstance(module, StableDiffusionSafetyChecker):
        return (jnp.zeros((1, module.config.image_size, module.config.image_size, 3)),)
    if isinstance(module, QuickSRNet):
        return (jnp.zeros((1, 1, 1, module.config.in_channels)),)
    if isinstance(module, T5Encoder | T5EncoderWithProjection):
        return ids, ids
    return (ids,)


def component_folder(root: Path, name: str) -> pathlib.Path:
    """Return the folder of a component inside a whole checkpoint.

    Raises:
      InputError: the checkpoint or the component is not there.
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        raise InputError(
            f'{root}: no such checkpoint folder. Pass the folder that holds diffusion_transformer_320p/ etc.'
        )
    if not (root / name).is_dir():
        raise InputError(
            f'{root}: no component "{name}" in it. Pass the root of the released checkpoint, or complete it.'
        )
    return root / name


def _read_config(folder: pathlib.Path) -> tuple[Component, ComponentConfig]:
    """Return the component and the sizes that a folder's `config.json` names."""
    path = folder / 'config.json'
    if not folder.is_dir():
        raise InputError(
            f'{folder}: no such folder. Pass the folder of one component, such as CHECKPOINT/context_adapter.'
        )
    if not path.is_file():
        inside = sorted(child.name for child in folder.iterdir() if (child / 'config.json').is_file())
        hint = f'It holds components; pass one of them: {", ".join(inside)}.' if inside else 'Copy the folder again.'
        raise InputError(f'{folder}: no config.json in it. {hint}')
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f'{path}: not valid JSON ({error}). Copy the file again.') from None
    if not isinstance(values, dict):
        raise InputError(f'{path}: not a JSON object. Copy the file again.')
    name = values.get('_class_name') or next(iter(values.get('architectures') or ()), None)
    if name not in COMPONENTS:
        raise InputError(f'{path}: class {name!r} is not supported; expected one of {", ".join(COMPONENTS)}.')
    component = COMPONENTS[name]
    return component, component.config.from_json(values, str(path))


def weight_paths(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the safetensors files of a component: one, or the shards of an index."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f'{name}.index.json'
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())['weight_map'].values()))
            for shard in shards:
                if not (folder / shard).is_file():
                    raise InputError(f'{index}: its shard {shard} is missing. Copy the folder again.')
            return [folder / shard for shard in shards]
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(('.pth', '.pth.tar', '.pt', '.bin')))
    if pickles:
        raise InputError(
            f'{folder}: {pickles[0]} is a PyTorch pickle, which can run code and is not read; save its state dict with '
            f'safetensors.torch.save_file as {WEIGHT_FILES[0]}.'
        )
    raise InputError(f'{folder}: no weights in it (looked for {" and ".join(WEIGHT_FILES)}). Copy the folder again.')


def _read_weights(folder: pathlib.Path, entries: list[Entry]) -> Params:
    """Read the tensors that the entries name, checking that they are all of the file."""
    tensors: dict[str, np.ndarray] = {}
    for path in weight_paths(folder):
        try:
            with safetensors.safe_open(path, framework='numpy') as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f'{path}: truncated or not a safetensors file ({error}). Copy it again.') from None
    for alias, name in T5_TIED_NAMES.items():
        if alias in tensors:
            tensors.setdefault(name, tensors[alias])
    missing = [entry.torch_name for entry in entries if entry.torch_name not in tensors]
    unknown = sorted(set(tensors) - {entry.torch_name for entry in entries} - REDUNDANT)
    for problem, names in (('is missing', missing), ('is not expected', unknown)):
        if names:
            more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
            raise InputError(
                f'{folder}: tensor {names[0]}{more} {problem} for the sizes in its config.json. '
                'Weights and config belong to different models; copy the folder again.'
            )
    return traverse_util.unflatten_dict(
        {entry.path: entry.convert.to_flax(tensors.pop(entry.torch_name)) for entry in entries}
    )


def _check_shapes(folder: pathlib.Path, module: nn.Module, params: Params, entries: list[Entry]) -> None:
    """Raise InputError unless every parameter has the shape that the module gives it."""
    want, got = (dict[Any, Any](traverse_util.flatten_dict(tree)) for tree in (abstract_params(module), params))
    for entry in entries:
        if want[entry.path].shape != got[entry.path].shape:
            shape, should = (jax.eval_shape(entry.convert.to_torch, tree[entry.path]).shape for tree in (got, want))
            raise InputError(
                f'{folder}: tensor {entry.torch_name} has shape {list(shape)}; config.json asks for {list(should)}. '
                'Weights and config belong to different models; copy the folder again.'
            )


def save_native(folder: Path, tree: Any) -> None:
    """Write any tree of arrays as an Orbax checkpoint; it appears when complete. Sharded arrays are written sharded.

    Raises:
      InputError: the folder exists.
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists():
        raise InputError(f'{folder}: exists. Choose another folder or remove it.')
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def restore_native(folder: Path, target: Any = None) -> Any:
    """Read an Orbax checkpoint written by `save_native`.

    Args:
      target: tree of arrays or `jax.ShapeDtypeStruct` (with shardings) to restore into; None restores as saved.
    Raises:
      InputError: the folder is absent or does not hold a complete checkpoint.
    """
    folder = pathlib.Path(folder).absolute()
    if not folder.is_dir():
        raise InputError(f'{folder}: no such checkpoint folder.')
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder, target)
    except (FileNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f'{folder}: not a complete Orbax checkpoint of this tree ({reason}).') from None
