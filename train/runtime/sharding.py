"""The device mesh, and the sharding of parameters and batches over it.

The mesh has three axes. `data` replicates parameters and splits the batch; `fsdp` splits the batch and every large
parameter; `tensor` splits attention heads and hidden units: the first of two matrices by its columns, the second by
its rows, so that each pair needs one reduction.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from neodragon_jax.base.errors import InputError
from neodragon_jax.models.mesh import HEADS_AXIS, PARAMETERS_AXIS

DATA, FSDP, TENSOR = 'data', PARAMETERS_AXIS, HEADS_AXIS
AXES, BATCH_AXES = (DATA, FSDP, TENSOR), (DATA, FSDP)

# Mesh axes of a parameter's last dimensions, by the end of its path; the first matching rule applies. Dimensions to the
# left (blocks stacked by a scan) are never split: every device needs its part of each block. The rules cover
# PyramidMMDiT, scanned or not, then the other models of the programs, and trees that contain them, such as optimizer
# states.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r'(image|text)_(query|key|value)/kernel', (FSDP, TENSOR)),
    (r'(image|text)_(query|key|value)/bias', (TENSOR,)),
    (r'(image|text)_out/kernel', (TENSOR, FSDP)),
    (r'(image_mlp|text_mlp|time_embed|pooled_embed)/linear_1/kernel', (FSDP, TENSOR)),
    (r'(image_mlp|text_mlp|time_embed|pooled_embed)/linear_1/bias', (TENSOR,)),
    (r'(image_mlp|text_mlp|time_embed|pooled_embed)/linear_2/kernel', (TENSOR, FSDP)),
    # Not split over the tensor axis: with such a split, XLA's partitioner (jaxlib 0.10.2) returns wrong gradients on
    # meshes that split all three axes. tests/train/dmd/test_program.py compares meshes.
    (r'((last_|head_)modulator|modulators(_\d+)?)(/(image|text))?/linear/kernel', (FSDP, None, None)),
    (r'((last_|head_)modulator|modulators(_\d+)?)(/(image|text))?/linear/bias', ()),
    (r'patch_embed/kernel', (None, FSDP)),
    (r'head/kernel', (FSDP, None)),
    (r'positions', (None, None, FSDP)),
    # Added to activations that are replicated over the tensor axis.
    (r'((image|text)_out|linear_2|patch_embed|head)/bias', ()),
    (r'(image|text)_(query|key)_norm/scale', ()),
    # ContextAdapter: every layer reads the whole output of the previous one, and the adapter's input.
    (r'layer_\d+/kernel', (FSDP, None)),
    (r'layer_\d+/bias', ()),
    # T5, as the text teacher (T5-XXL) and as DT5: heads and hidden units over `tensor`, like the denoiser's. Layers of
    # CLIP and of the VAEs with the same names are split alike.
    (r'attention/(query|key|value)/kernel', (FSDP, TENSOR)),
    (r'attention/out/kernel', (TENSOR, FSDP)),
    (r'mlp_(gate|value)/kernel', (FSDP, TENSOR)),
    (r'mlp_out/kernel', (TENSOR, FSDP)),
    (r'projection_in/kernel', (FSDP, TENSOR)),
    (r'projection_out/kernel', (TENSOR, FSDP)),
    (r'token_embedding/embedding', (None, FSDP)),
    # The linear embedding of text states, of the multi-step denoiser and of the text teacher; low-rank updates.
    (r'(context_embedder|embedder)/kernel', (FSDP, None)),
    (r'critic_(key|value)_\d+/kernel', (FSDP, None)),
    (r'lora_down', (FSDP, None)),
    (r'lora_up', (None, FSDP)),
    # CLIP and video VAEs: small compared to the denoisers, for which the tensor axis exists.
    (r'(mlp_in|projection)/kernel', (FSDP, None)),
    (r'(\w+_)?(resnet|memory)_\d+/conv_\d+/kernel', (FSDP, None)),
    (r'(halve|double)_(space|time)/kernel', (FSDP, None)),
    (r'(conv_out|level_\d+_out)/kernel', (FSDP, None)),
    (r'lpips/conv_\d+/kernel', (FSDP, None)),
)
_COMPILED_RULES = tuple((re.compile(f'(^|/){pattern}$'), axes) for pattern, axes in RULES)

# Elements up to which a tensor may be replicated: 1 MiB of float32, more than any bias of the full model.
SMALL = 2**18


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one size may be -1, for all remaining devices.

    Attributes:
      data: copies of the parameters, between which the batch is split.
      fsdp: devices between which the batch and every large parameter are split.
      tensor: devices between which attention heads and hidden units are split.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh with axes ('data', 'fsdp', 'tensor') over all devices.

    A single process may use fewer devices than it has if all three sizes are given. Neighbors along an axis are
    neighbors in a TPU slice where the sizes allow it; an axis may also cover a part of a physical axis. Over several
    slices, only `data` crosses the links between them.

    Raises:
      InputError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = list(dataclasses.astuple(config)), len(devices)
    asked = 'x'.join(map(str, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f'mesh {asked} (data x fsdp x tensor): sizes are positive, and at most one is -1 (the rest).')
    given = math.prod(size for size in sizes if size != -1)
    if count % given:
        factors = ', '.join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise InputError(
            f'mesh {asked} (data x fsdp x tensor): {given} does not divide the {count} devices evenly. '
            f'Choose sizes whose product is {count} (its factors: {factors}), or set one of them to -1.'
        )
    if given < count and -1 not in sizes and jax.process_count() > 1:
        raise InputError(unused_devices(config, count) + ' Several processes must use all of their devices.')
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // given
    used = devices[: math.prod(sizes)]
    slices = len({getattr(device, 'slice_index', 0) for device in used})
    if slices > 1:
        return _mesh_over_slices(sizes, used, slices)
    return _named(mesh_utils.create_device_mesh(sizes, used, allow_split_physical_axes=True))


def unused_devices(config: MeshConfig, count: int) -> str:
    """Return the sentences on a mesh that uses a part of `count` devices: how many it leaves idle, and the remedy."""
    used = config.data * config.fsdp * config.tensor
    return (
        f'mesh {config.data}x{config.fsdp}x{config.tensor} (data x fsdp x tensor) uses {used} of the {count} devices. '
        f'Set loop.mesh.data to {config.data * count // used} or to -1 to use all.'
    )


def _named(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _mesh_over_slices(sizes: Sequence[int], devices: Sequence[Any], slices: int) -> Mesh:
    """Return a mesh over several TPU slices: `data` crosses the slow links between them, the other axes stay inside.

    Raises:
      InputError: the slices do not divide `data`.
    """
    data, *inside = sizes
    if data % slices:
        raise InputError(
            f'mesh {"x".join(map(str, sizes))} (data x fsdp x tensor) on {slices} slices: fsdp and tensor must stay '
            f'inside a slice; choose a multiple of {slices} for data.'
        )
    shape, between = (data // slices, *inside), (slices, 1, 1)
    return _named(mesh_utils.create_hybrid_device_mesh(shape, between, devices, allow_split_physical_axes=True))


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return a NamedSharding for every leaf of a tree of arrays or abstract arrays.

    The tree may be parameters or anything that holds trees shaped like them: optimizer states, whole loop states.

    Raises:
      InputError: a large leaf has no rule, or the mesh does not divide it.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh.shape, path_name(path), leaf.shape)), tree
    )


def path_name(path: Sequence[Any]) -> str:
    """Return a key path of `jax.tree_util` as 'a/b/c'."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def rule_of(name: str) -> tuple[str | None, ...] | None:
    """Return the mesh axes of a parameter's last dimensions, or None if no rule matches its path."""
    return next((axes for pattern, axes in _COMPILED_RULES if pattern.search(name)), None)


def _spec(mesh_shape: Mapping[str, int], name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Return the partition of one leaf: a small one may be replicated, a large one must be split by a rule."""
    axes, large = rule_of(name), math.prod(shape) > SMALL
    if axes is None or len(axes) > len(shape):
        if large:
            raise InputError(
                f'parameter {name} {list(shape)} has no sharding rule; add one to RULES in train/runtime/sharding.py.'
            )
        return PartitionSpec()
    axes = (None,) * (len(shape) - len(axes)) + axes
    kept: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        divides = axis is None or size % mesh_shape[axis] == 0
        if large and axis is not None and not divides:
            raise InputError(
                f'parameter {name} {list(shape)}: mesh axis {axis}={mesh_shape[axis]} does not divide its dimension of '
                f'{size}; choose a size of {axis} that does.'
            )
        kept.append(axis if divides else None)
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of batches: dimension `axis` split over ('data', 'fsdp'), the others whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, BATCH_AXES))


def batch_groups(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of parts of a batch on a mesh."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def split_batch(tree: Any, axis: int = 0) -> Any:
    """Constrain dimension `axis` of arrays to ('data', 'fsdp'), like the batch; outside a step, do nothing.

    Use it for activations whose layout the compiler cannot infer, such as a concatenation along the batch.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    spec = PartitionSpec(*(None,) * axis, BATCH_AXES)
    return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, spec), tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, params: Any) -> Any:
    """Put host arrays with a batch axis on the mesh of the parameters; split them if the mesh divides the batch.

    The arrays must be equal on every process.
    """
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return tree
    mesh, rows = sharding.mesh, jax.tree.leaves(tree)[0].shape[0]
    batch = batch_sharding(mesh) if rows % batch_groups(mesh) == 0 else replicated(mesh)  # pyright: ignore[reportArgumentType]
    return put(tree, jax.tree.map(lambda _: batch, tree))


def put(tree: Any, shardings: Any) -> Any:
    """Place host arrays, equal on every process, into shardings; each process uploads only its parts."""

    def upload(leaf: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(upload, tree, shardings)


def to_host(tree: Any) -> Any:
    """Return sharded arrays as whole NumPy arrays, on every process. Every process must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def count_parameters(tree: Any) -> int:
    """Return the number of elements in a tree of arrays or abstract arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Return the bytes that one device holds of a tree."""
    parts = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * _itemsize(leaf), tree, shardings
    )
    return sum(jax.tree.leaves(parts))


def _itemsize(leaf: Any) -> int:
    """Return the bytes per element, also for random keys."""
    return leaf.dtype.itemsize


def describe(mesh: Mesh, tree: Any) -> str:
    """Return one line per leaf, 'path  shape  type  spec', after a line for the mesh: for plans and golden files."""
    shardings = param_shardings(mesh, tree)
    rows = []
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shardings), strict=True
    ):
        shape = 'x'.join(map(str, leaf.shape)) or 'scalar'
        spec = ', '.join(axis or '-' for axis in sharding.spec) or 'replicated'
        rows.append((path_name(path), shape, str(leaf.dtype), spec))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = ['mesh ' + ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())]
    for *columns, spec in rows:
        lines.append('  '.join([*(text.ljust(width) for text, width in zip(columns, widths, strict=True)), spec]))
    return '\n'.join(lines)
