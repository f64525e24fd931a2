"""The mesh and the parameter rules: split and replicated axes, and rejected configurations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.config.neodragon import FULL, TINY
from neodragon_jax.config.pyramid_flow import PYRAMID_FLOW_VAE, T5_XXL, TEACHER
from neodragon_jax.models.clip import CLIPTextModel
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.t5 import T5Encoder, T5EncoderWithProjection
from neodragon_jax.models.teacher import TeacherMMDiT
from neodragon_jax.models.vae import VideoVAE
from support.goldens import relative_error
from support.toy_program import LinearSource, Toy, config_for
from train.runtime import loop, sharding
from train.runtime.metrics import read_metrics
from train.runtime.sharding import (
    AXES,
    MeshConfig,
    batch_sharding,
    bytes_per_device,
    make_mesh,
    param_shardings,
    path_name,
    put,
    to_host,
)


def specs_by_path(mesh, tree):
    flat = jax.tree_util.tree_leaves_with_path(param_shardings(mesh, tree))
    return {path_name(path): leaf.spec for path, leaf in flat}


@pytest.fixture(scope='module')
def tiny():
    return {scan: abstract_params(PyramidMMDiT(TINY.denoiser, scan=scan)) for scan in (True, False)}


@pytest.mark.parametrize(
    ('config', 'sizes'),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1)),
        (MeshConfig(data=1, fsdp=1, tensor=1), (1, 1, 1)),
    ],
)
def test_mesh_sizes(config, sizes):
    assert tuple(make_mesh(config).shape.values()) == sizes


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (MeshConfig(fsdp=3), r'-1x3x1 .*3 does not divide the 8 devices.*1, 2, 4, 8'),
        (MeshConfig(data=4, fsdp=4), r'16 does not divide the 8 devices'),
        (MeshConfig(data=-1, fsdp=-1), r'at most one is -1'),
        (MeshConfig(data=0), r'sizes are positive'),
    ],
)
def test_impossible_meshes_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        make_mesh(config)


def test_several_processes_use_all_devices(monkeypatch):
    """4 divides 8: the message must not say that it does not."""
    config = MeshConfig(1, 4, 1)
    assert make_mesh(config).size == 4
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(InputError, match=r'1x4x1 .* uses 4 of the 8 devices\. Set loop\.mesh\.data to 2 or to -1'):
        make_mesh(config)


@pytest.mark.parametrize('scan', [True, False])
def test_rules_know_every_parameter_of_the_denoiser(tiny, scan):
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tiny[scan])]
    assert [name for name in names if sharding.rule_of(name) is None] == []


COMPONENTS = {
    'denoiser': PyramidMMDiT(FULL.denoiser, scan=True),
    'teacher': TeacherMMDiT(TEACHER, scan=True),
    'context_adapter': ContextAdapter(FULL.context_adapter),
    'dt5': T5EncoderWithProjection(FULL.t5),
    't5_xxl': T5Encoder(T5_XXL),
    'clip_l': CLIPTextModel(FULL.clip_l, projection=True),
    'clip_g': CLIPTextModel(FULL.clip_g, projection=True),
    'video_vae': VideoVAE(FULL.video_vae),
    'native_vae': NativeVAE(PYRAMID_FLOW_VAE),
}


@pytest.mark.parametrize('module', COMPONENTS.values(), ids=COMPONENTS.keys())
def test_no_large_parameter_is_whole_under_fsdp(module):
    tree = abstract_params(module)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    shardings = param_shardings(mesh, tree)
    whole = jax.tree.map(lambda leaf, place: math.prod(leaf.shape) * place.is_fully_replicated, tree, shardings)
    assert max(jax.tree.leaves(whole)) <= sharding.SMALL
    total = bytes_per_device(tree, jax.tree.map(lambda _: sharding.replicated(mesh), tree))
    assert bytes_per_device(tree, shardings) < 1.1 * total / 8


def test_matrices_pair_column_then_row_over_tensor(tiny):
    specs = specs_by_path(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)), tiny[True])
    assert specs['blocks/image_query/kernel'] == PartitionSpec(None, 'fsdp', 'tensor')
    assert specs['blocks/image_query/bias'] == PartitionSpec(None, 'tensor')
    assert specs['blocks/image_out/kernel'] == PartitionSpec(None, 'tensor', 'fsdp')
    assert specs['blocks/text_mlp/linear_1/kernel'] == PartitionSpec(None, 'fsdp', 'tensor')
    assert specs['blocks/text_mlp/linear_2/kernel'] == PartitionSpec(None, 'tensor', 'fsdp')
    # A modulator is never split over tensor: see RULES.
    assert specs['modulators/image/linear/kernel'] == PartitionSpec(None, 'fsdp')
    assert specs['last_block/image_query_norm/scale'] == PartitionSpec()
    assert specs['positions'] == PartitionSpec(None, None, 'fsdp')


def test_unrolled_blocks_are_split_as_scanned_ones(tiny):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    scanned, unrolled = (specs_by_path(mesh, tiny[scan]) for scan in (True, False))
    for name, spec in unrolled.items():
        stacked = name.replace('blocks_0/', 'blocks/').replace('modulators_0/', 'modulators/')
        # Equal without the axis of the scan, which the norms' empty spec does not show.
        assert scanned[stacked] in (spec, PartitionSpec(None, *spec)), name


def test_optimizer_state_is_split_as_its_parameters(tiny):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    params = specs_by_path(mesh, tiny[True])
    state = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init, tiny[True])
    specs = specs_by_path(mesh, {'student': tiny[True], 'optimizer': state, 'step': jnp.zeros((), jnp.int32)})
    assert specs['step'] == PartitionSpec()
    for name, spec in params.items():
        suffixed = [other for path, other in specs.items() if path.endswith('/' + name)]
        assert len([path for path in specs if path.startswith('optimizer') and path.endswith('/' + name)]) == 2
        assert set(suffixed) == {spec}


def test_large_parameters_without_a_place_are_refused():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    big, small = jnp.zeros((1024, 1001)), jnp.zeros((7, 5))
    with pytest.raises(InputError, match=r'mystery/kernel \[1024, 1001\] has no sharding rule'):
        param_shardings(mesh, {'mystery': {'kernel': big}})
    with pytest.raises(InputError, match=r'patch_embed/kernel .*fsdp=8 does not divide its dimension of 1001'):
        param_shardings(mesh, {'patch_embed': {'kernel': big}})
    specs = specs_by_path(mesh, {'mystery': {'kernel': small}, 'patch_embed': {'kernel': small}})
    assert set(specs.values()) == {PartitionSpec()}


def test_put_and_to_host_are_inverse(tiny):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rng = np.random.default_rng(0)
    host = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tiny[True])
    shardings = param_shardings(mesh, host)
    placed = put(host, shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == shardings
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(placed), host)


def test_batches_are_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)
    assert batch_sharding(mesh, axis=1).shard_shape((3, 8, 5)) == (3, 2, 5)


def test_activations_keep_to_the_batch_where_there_is_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    activations = jnp.zeros((3, 8, 5))
    assert sharding.split_batch(activations, axis=1) is activations

    def step(array):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return sharding.split_batch(array + 1, axis=1)

    whole = jax.device_put(activations, sharding.replicated(mesh))
    assert jax.jit(step)(whole).sharding.is_equivalent_to(batch_sharding(mesh, axis=1), 3)


def test_description_reads_like_a_table(tiny):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    lines = sharding.describe(mesh, tiny[True]).splitlines()
    assert lines[0] == 'mesh data=1 fsdp=4 tensor=2'
    assert len(lines) == 1 + len(jax.tree.leaves(tiny[True]))
    row = next(line for line in lines if line.startswith('blocks/image_mlp/linear_2/kernel'))
    assert row.split(None, 3) == ['blocks/image_mlp/linear_2/kernel', '1x256x64', 'float32', '-, tensor, fsdp']


# TPU slices, whose devices stand on a grid.

KINDS = {'v4': 'TPU v4', 'v5e': 'TPU v5 lite', 'v5p': 'TPU v5', 'v6e': 'TPU v6 lite'}


class GridDevice:
    """A TPU device at a place of its slice's grid."""

    platform, core_on_chip, process_index = 'tpu', 0, 0

    def __init__(self, kind: str, coords: tuple[int, ...], slice_index: int) -> None:
        self.device_kind, self.coords, self.slice_index = KINDS[kind], (*coords, 0, 0)[:3], slice_index
        self.id = hash((slice_index, coords))


def grid_devices(name: str, slices: int = 1) -> list[Any]:
    kind, _, shape = name.partition(':')
    places = [range(int(size)) for size in shape.split('x')]
    return [GridDevice(kind, coords, number) for number in range(slices) for coords in itertools.product(*places)]


@pytest.mark.parametrize('slices', [1, 2])
@pytest.mark.parametrize('name', ['v4:4x4x4', 'v5e:4x4', 'v5e:8x8', 'v5p:2x2x4', 'v5p:4x4x4', 'v6e:4x4', 'v6e:8x8'])
def test_every_mesh_fits_on_every_slice(name, slices):
    """An axis of the mesh may be a part of a physical axis, such as 16 devices of 8x8."""
    devices = grid_devices(name, slices)
    each = len(devices) // slices
    powers = [2**power for power in range(each.bit_length())]
    sizes = [size for size in itertools.product(powers, repeat=3) if math.prod(size) == each]
    assert len(sizes) >= 15
    for data, fsdp, tensor in sizes:
        mesh = make_mesh(MeshConfig(data * slices, fsdp, tensor), devices)
        assert mesh.devices.shape == (data * slices, fsdp, tensor)
        assert {id(device) for device in mesh.devices.flat} == {id(device) for device in devices}


# Several slices.


class SliceDevice:
    """A device that reports the slice it is in, as TPU devices do."""

    def __init__(self, device: Any, slice_index: int) -> None:
        self.device, self.slice_index = device, slice_index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def __repr__(self) -> str:
        return f'slice {self.slice_index} {self.device}'


def two_slices(config: MeshConfig) -> Any:
    """Return the devices of a mesh over two simulated slices of interleaved devices."""
    return make_mesh(config, [SliceDevice(device, index % 2) for index, device in enumerate(jax.devices())]).devices


@pytest.mark.parametrize('config', [MeshConfig(2, 4, 1), MeshConfig(4, 1, 2), MeshConfig(-1, 2, 2)])
def test_only_the_data_axis_crosses_slices(config):
    devices = two_slices(config)
    assert devices.size == 8
    for row in devices.reshape(devices.shape[0], -1):
        assert len({device.slice_index for device in row}) == 1
    assert {device.slice_index for device in devices[:, 0, 0]} == {0, 1}


def test_axes_that_cross_slices_are_refused():
    with pytest.raises(
        InputError, match='on 2 slices: fsdp and tensor must stay inside a slice; choose a multiple of 2'
    ):
        two_slices(MeshConfig(1, 8, 1))


def mesh_over_two_slices(config: MeshConfig) -> Any:
    """Return a mesh of real devices in the order of two simulated slices."""
    unwrap = np.vectorize(lambda device: device.device, otypes=[object])
    return jax.sharding.Mesh(unwrap(two_slices(config)), AXES)


def test_two_slices_train_as_one_mesh_of_eight(tmp_path, monkeypatch):
    results = []
    for slices in (1, 2):
        if slices == 2:
            monkeypatch.setattr(loop, 'make_mesh', mesh_over_two_slices)
        config = config_for(tmp_path / str(slices), steps=4, log_every=1, mesh=MeshConfig(2, 2, 2))
        state = loop.run(Toy(), LinearSource(), config)
        results.append((to_host(state.student), [row['loss'] for row in read_metrics(tmp_path / str(slices))]))
    (want, losses), (got, others) = results
    assert others == pytest.approx(losses, rel=1e-6)
    assert max(jax.tree.leaves(jax.tree.map(relative_error, got, want))) < 1e-6
