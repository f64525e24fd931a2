"""Reading compiled programs: arithmetic, loops, kernels and communication against counts made by hand."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from support.goldens import GOLDENS
from train.aot import cost as aot_cost
from train.aot import hlo, traffic
from train.aot.chips import CHIPS


def compiled_text(function, *arguments, **options) -> str:
    return jax.jit(function, **options).lower(*arguments).compile().as_text() or ''


def cost_of(text: str) -> aot_cost.Cost:
    return aot_cost.analyze(hlo.parse(text))


def test_tpu_program_counts_every_round_of_its_loops():
    """Six rematerialized layers tanh(x W), forward and backward; x [8192, 4096] per chip, W split 16 ways.

    Compiled for v5e:4x4 by libtpu 0.0.42.1, layouts and metadata removed. XLA's own count of it is 1.10e12.
    """
    module = hlo.parse((GOLDENS / 'hlo' / 'scan_v5e_4x4.txt').read_text())
    cost = aot_cost.analyze(module)
    product = 2 * 8192 * 4096 * 4096
    assert module.devices == 16
    assert cost.flops == 6 * 4 * product  # forward, forward again, two gradients
    # Matrix units do 131,072 FLOPs per cycle; the other operations take the rest of the cycles.
    assert 1.0 < cost.cycles / (cost.flops / 131072) < 1.3
    weights = 4096 * 4096 * 2
    assert aot_cost.collective_bytes(cost, {'data': 1, 'fsdp': 16}) == {
        ('all-gather', 'fsdp'): 6 * 2 * weights * 15 / 16,
        ('all-reduce', 'fsdp'): 6 * 2 * weights * 15 / 16 + 2 * 4 * 15 / 16,  # and the loss
    }
    assert not cost.unknown_loops and not cost.kernels


def test_nested_loops_multiply():
    def function(x, w):
        inner = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, w)[0], None), x, length=5)[0]

    text = compiled_text(function, jnp.zeros((8, 16)), jnp.zeros((3, 16, 16)))
    cost = cost_of(text)
    assert cost.flops == 5 * 3 * 2 * 8 * 16 * 16
    assert not cost.unknown_loops


def test_loop_without_a_trip_count_is_named():
    function = lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: x @ x, x)
    cost = cost_of(compiled_text(function, jnp.ones((4, 4))))
    assert cost.flops == 2 * 4**3
    assert len(cost.unknown_loops) == 1


LOOP = """HloModule m, num_partitions=4

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0:T(256)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = f32[8]{0:T(256)S(1)} get-tuple-element(%p), index=1
  %y = f32[8]{0:T(256)S(1)} all-reduce(%x), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%sum
  ROOT %t = (s32[], f32[8]{0:T(256)S(1)}) tuple(%next, %y)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[]{:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  ROOT %lt = pred[]{:T(512)} compare(%a, %b), direction=LT
}

%condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0:T(256)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %bound = s32[]{:T(128)} constant(9)
  ROOT %fused = pred[]{:T(512)} fusion(%i.1, %bound), kind=kLoop, calls=%less
}

ENTRY %main (x.1: f32[8]) -> (s32[], f32[8]) {
  %x.1 = f32[8]{0:T(256)} parameter(0)
  %start = s32[]{:T(128)} constant(2)
  %init = (s32[], f32[8]{0:T(256)}) tuple(%start, %x.1)
  ROOT %loop = (s32[], f32[8]{0:T(256)}) while(%init), condition=%condition, body=%body
}
"""


def test_trip_count_from_a_fused_condition_and_a_start_that_is_not_zero():
    cost = cost_of(LOOP)
    assert cost.collectives == {('all-reduce', (0, 1)): 7 * 2 * 32 * 0.5}
    assert not cost.unknown_loops


SCATTER = """HloModule m, num_partitions=4

%all-reduce-scatter.3.clone (input: bf16[4,8]) -> bf16[2,8] {
  %input = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %sum.5 = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%sum
  %start = u32[] constant(2)
  %zero = u32[] constant(0)
  ROOT %part = bf16[2,8]{1,0:T(8,128)(2,1)} dynamic-slice(%sum.5, %start, %zero), dynamic_slice_sizes={2,8}
}

ENTRY %main (x: bf16[4,8]) -> bf16[2,8] {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %fusion.1 = bf16[2,8]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3.clone
}
"""


def test_fused_slices_of_an_all_reduce_are_a_reduce_scatter():
    assert cost_of(SCATTER).collectives == {('reduce-scatter', (0, 1)): 4 * 8 * 2 / 2}
    apart = SCATTER.replace('all-reduce-scatter.3.clone', 'fused_computation.3')
    assert cost_of(apart).collectives == {('all-reduce', (0, 1)): 2 * 4 * 8 * 2 / 2}


# As the TPU compiler writes it: attributes with line breaks, tiled layouts, a tuple of results.
KERNEL = """HloModule m, num_partitions=4

ENTRY %main (q: bf16[2,4,80,896]) -> bf16[2,4,896,64] {
  %q = bf16[2,4,80,896]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,4,80,1792]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[2,4,64,1792]{3,2,1,0:T(8,128)(2,1)} parameter(3)
  %ids = s8[1,1,1]{2,1,0:T(4,128)(4,1)} parameter(2)
  %splash_mha_fwd_segmented_residuals.11 = (f32[2,128,128]{2,1,0:T(8,128)}, bf16[2,4,896,64]{3,2,1,0}) \
custom-call(%ids, %q, %k, /*index=3*/%v), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 896, \\"q_layout\\": 2, \\"k_layout\\": 2, \\"v_layout\\": 2}"
}}, backend_config={"custom_call_config":{"body":"TUzv"}}
  %other.3 = f32[8]{0} custom-call(%q), custom_call_target="tpu_custom_call"
  ROOT %out = bf16[2,4,896,64]{3,2,1,0} get-tuple-element(%splash_mha_fwd_segmented_residuals.11), index=1
}
"""
OPERAND = """HloModule m, num_partitions=1

ENTRY %main (x: bf16[2,4,64,1600]) -> bf16[2,4,80,1792] {
  %x = bf16[2,4,64,1600]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %attention_operand.7 = bf16[2,4,80,1792]{3,2,1,0:T(8,128)(2,1)S(1)} custom-call(%x), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv"}}
}
"""


def test_kernels_of_operands_take_the_time_of_their_bytes():
    chip = CHIPS['v5e']
    cost = aot_cost.analyze(hlo.parse(OPERAND), chip)
    moved = 2 * 4 * (64 * 1600 + 80 * 1792) * 2
    assert cost.calibrated == pytest.approx(moved / (0.8 * chip.hbm_bytes) * chip.clock)
    assert not cost.kernels and not cost.unknown_kernels


def test_attention_kernel_is_two_products_and_others_are_named():
    """The 16 dimensions of queries and keys beyond those of the values hide scores, and do not count."""
    cost = cost_of(KERNEL)
    assert cost.kernels == {'splash_mha_fwd_segmented_residuals': (1, 2 * 2 * (2 * 4) * 896 * 1792 * 64)}
    assert cost.unknown_kernels == {'other': 1}


@pytest.mark.parametrize(
    ('attributes', 'group'),
    [
        ('replica_groups={{0,2},{1,3}}, dimensions={0}', (0, 2)),
        ('replica_groups=[2,4]<=[8]', (0, 1, 2, 3)),
        ('replica_groups=[4,2]<=[2,4]T(1,0)', (0, 4)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", tuple(range(8))),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", (0, 2)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", (3, 1)),
        ('replica_groups={}', tuple(range(8))),
        ('source_target_pairs={{1,3},{3,1}}', (1, 3)),
    ],
)
def test_groups(attributes, group):
    assert hlo.first_group(attributes, devices=8) == group


def test_unknown_form_of_groups_is_refused():
    with pytest.raises(ValueError, match='unknown form'):
        hlo.first_group('replica_groups=ring(4), dimensions={0}', devices=8)


def test_groups_by_mesh_axis():
    mesh = {'data': 2, 'fsdp': 4, 'tensor': 1}
    assert hlo.group_axes((0, 1, 2, 3), mesh) == 'fsdp'
    assert hlo.group_axes((0, 4), mesh) == 'data'
    assert hlo.group_axes(tuple(range(8)), mesh) == 'data,fsdp'
    assert hlo.group_axes((3,), mesh) == ''


@pytest.mark.parametrize(
    ('stride', 'padding', 'dilate', 'window_dilate'), itertools.product((1, 2), (0, 3), (1, 2), (1, 2))
)
def test_products_of_a_convolution_skip_padding_and_holes(stride, padding, dilate, window_dilate):
    """Ones convolved with ones count the products that an output position makes."""
    size, window = 7, 3
    ones = lambda n: jnp.ones((1, n, 1))
    out = jax.lax.conv_general_dilated(
        ones(size), jnp.ones((window, 1, 1)), (stride,), [(padding, padding)], (dilate,), (window_dilate,),
        dimension_numbers=('NWC', 'WIO', 'NWC'),
    )  # fmt: skip
    places = out.shape[1]
    got = aot_cost._valid_products(size, window, places, stride, padding, dilate, window_dilate)
    assert got == int(jnp.sum(out))


def test_batched_product_written_as_a_convolution():
    """A batch becomes a spatial axis whose window slides so that each step meets one element."""
    line = (
        '  %c = bf16[24,128,64]{2,1,0} convolution(%a, %b), window={size=24 stride=23 pad=0_0 lhs_dilate=24}, '
        'dim_labels=0bf_0io->0bf'
    )
    text = (
        'HloModule m\n\nENTRY %main (a: bf16[24,128,256]) -> bf16[24,128,64] {\n'
        '  %a = bf16[24,128,256]{2,1,0} parameter(0)\n  %b = bf16[24,256,64]{2,1,0} parameter(1)\n'
        f'{line.replace("%c", "ROOT %c")}\n}}\n'
    )
    assert cost_of(text).flops == 2 * 24 * 128 * 256 * 64


def test_fsdp_gathers_weights_and_reduces_gradients():
    mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
    at = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    weights, x = at((64, 64), 'fsdp'), at((32, 64), ('data', 'fsdp'))
    function = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w)))
    cost = cost_of(compiled_text(function, weights, x, out_shardings=weights.sharding))
    received = aot_cost.collective_bytes(cost, dict(mesh.shape))
    assert cost.flops == 2 * (2 * 4 * 64 * 64)
    size = 4 * 64 * 64
    assert received['all-gather', 'fsdp'] == size * 3 / 4
    assert sum(value for (kind, _), value in received.items() if kind != 'all-gather') >= size * 3 / 4


def test_shapes_know_their_bytes():
    module = hlo.parse(KERNEL)
    kernel = module.computations[module.entry]['splash_mha_fwd_segmented_residuals.11']
    assert [shape.bytes for shape in kernel.shapes] == [4 * 2 * 128 * 128, 2 * math.prod((2, 4, 896, 64))]
    assert hlo.Shape('s4', (3,)).bytes == 1.5 and hlo.Shape('pred', (5,)).bytes == 5
    assert hlo.Shape('f8e4m3fn', (7,)).bytes == 7 and hlo.Shape('f32', ()).bytes == 4
    assert np.isclose(hlo.Shape('token', ()).bytes, 0)


# Calibration.


MEMORY_BOUND = """HloModule m, is_scheduled=true, num_partitions=1

ENTRY %main (x: f32[1024,100], y: bf16[256,8,128]) -> f32[1024,100] {
  %x = f32[1024,100]{1,0:T(8,128)} parameter(0)
  %y = bf16[256,8,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %copy = f32[1024,100]{1,0:T(8,128)} copy(%x), backend_config={"estimated_cycles":"CYCLES"}
}
"""


def test_operations_bound_by_memory_take_the_time_of_their_bytes():
    chip = CHIPS['v5e']
    moved = 2 * 4 * 1024 * 128  # read and written, a row of 100 numbers takes a tile of 128
    want = moved / (aot_cost.MEMORY_BUSY * chip.hbm_bytes / chip.clock)
    cost = aot_cost.analyze(hlo.parse(MEMORY_BOUND.replace('CYCLES', '90000')), chip)
    assert cost.cycles == 90000 and cost.calibrated == pytest.approx(want)
    cheap = aot_cost.analyze(hlo.parse(MEMORY_BOUND.replace('CYCLES', '10')), chip)
    assert cheap.calibrated == 10
    assert aot_cost.analyze(hlo.parse(MEMORY_BOUND.replace('CYCLES', '90000'))).calibrated == 90000


def test_stored_bytes_know_tiles_and_memory_spaces():
    module = hlo.parse(MEMORY_BOUND)
    shapes = {name: item.shapes[0] for name, item in module.computations[module.entry].items()}
    assert traffic.stored_bytes(shapes['x']) == 4 * 1024 * 128 and shapes['x'].bytes == 4 * 1024 * 100
    assert traffic.stored_bytes(shapes['y']) == 0
