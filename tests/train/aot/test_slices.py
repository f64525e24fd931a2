"""Sizing over several slices: bytes between slices in compiled programs, and their exposed time."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from neodragon_jax.base.errors import InputError
from support.sizing_cases import FITS, case, tiny_settings
from train.aot import chips as aot_chips
from train.aot import compilation, hlo, jobs, report, sizing
from train.aot import cost as aot_cost
from train.aot.collectives import Transfer

# Compiled for two slices of v5e:2x2 by libtpu 0.0.42.1; layouts and most attributes are left out.
TRANSFER = """HloModule jit_f, is_scheduled=true, num_partitions=4

%body (state: (s32[], bf16[256,8,128])) -> (s32[], bf16[256,8,128]) {
  %state = (s32[], bf16[256,8,128]) parameter(0)
  %gradient = bf16[256,8,128] get-tuple-element(%state), index=1
  %after-all = token[] after-all()
  %send = (bf16[256,8,128], u32[], token[]) send(%gradient, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[256,8,128], u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %copy.1 = bf16[256,8,128] copy(%gradient), backend_config={"estimated_cycles":"30000"}
  %recv-done = (bf16[256,8,128], token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  %sum = bf16[256,8,128] get-tuple-element(%recv-done), index=0
  %copy.2 = bf16[256,8,128] copy(%sum), backend_config={"estimated_cycles":"500"}
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %next = (s32[], bf16[256,8,128]) tuple(%i, %copy.2)
}

%condition (state.1: (s32[], bf16[256,8,128])) -> pred[] {
  %state.1 = (s32[], bf16[256,8,128]) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (first: (s32[], bf16[256,8,128])) -> (s32[], bf16[256,8,128]) {
  %first = (s32[], bf16[256,8,128]) parameter(0)
  ROOT %loop = (s32[], bf16[256,8,128]) while(%first), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_transfers_count_once_per_round_with_what_runs_meanwhile():
    cost = aot_cost.analyze(hlo.parse(TRANSFER))
    size = 2 * 256 * 8 * 128
    assert cost.transfers == {Transfer('all-reduce', 2, size, 30000.0): 3}
    assert cost.cycles == 3 * 30500
    four = TRANSFER.replace('{1,2}x', '{1:4}x')
    assert list(aot_cost.analyze(hlo.parse(four)).transfers) == [('all-reduce', 4, 1.5 * size, 30000.0)]
    with pytest.raises(ValueError, match='unknown transfer between slices'):
        aot_cost.analyze(hlo.parse(TRANSFER.replace('"ALL_REDUCE"', '"SOMETHING"')))


def test_exposed_time_is_what_the_operations_in_between_do_not_cover():
    chip = aot_chips.CHIPS['v5e']
    rows = compilation._between_slices(aot_cost.analyze(hlo.parse(TRANSFER)), chip)
    seconds = 2 * 256 * 8 * 128 / chip.dcn_bytes
    ((kind, slices, size, total, exposed),) = rows
    assert (kind, slices, size) == ('all-reduce', 2, 3 * 2 * 256 * 8 * 128)
    assert total == pytest.approx(3 * seconds)
    assert exposed == pytest.approx(3 * (seconds - 30000 / chip.clock))


def test_report_keeps_the_network_between_slices_apart():
    slices = aot_chips.topology('v5e:4x4', 2)
    assert (slices.devices, str(slices), slices.options()) == (32, '2 x v5e:4x4', {'num_slices': 2})
    facts = dataclasses.replace(FITS, between_slices=[('all-reduce', 2, 5e9, 1.6, 0.25)])
    ours = case(topology=slices, mesh=(2, 16, 1))
    before, times = report.estimate(ours, FITS), report.estimate(ours, facts)
    assert times.step_s == pytest.approx((before.step_s[0] + 0.25, before.step_s[1] + 1.6))
    text = report.text(ours, facts)
    assert '40.000 GB received per device and step, and 5.000 GB from other slices' in text
    assert 'all-reduce         over 2 slices' in text and '250.00 ms exposed' in text
    with pytest.raises(InputError, match='--num-slices=0: give 1 or more'):
        aot_chips.topology('v5e:4x4', 0)


def test_only_gradients_cross_two_simulated_slices():
    """On a mesh whose `data` axis crosses slices, a device receives its part of the gradient and nothing else."""
    mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
    at = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    weights, x = at((64, 64), 'fsdp'), at((32, 64), ('data', 'fsdp'))
    function = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w)))
    step = jax.jit(function, out_shardings=weights.sharding).lower(weights, x).compile()
    cost = aot_cost.analyze(hlo.parse(step.as_text() or ''))
    slice_of = lambda device: device // 4
    crossing = {key: size for key, size in cost.collectives.items() if len(set(map(slice_of, key[1]))) > 1}
    assert crossing == {('all-reduce', (0, 4)): 4 * 64 * 64 / 4}


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed: pip install .[tpu]')
def test_step_compiles_for_two_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, 'model_flops', lambda program, settings, batch_size: {0: 1.0, 1: 2.0, 2: 3.0})
    options = jobs.Options(('v5e:2x2',), meshes=((2, 4, 1),), batches=(1,), variant='0', cache=str(tmp_path), slices=2)
    settings = tiny_settings()
    settings.dmd.update(fake_updates=1)
    (job,) = jobs.make_jobs('dmd', settings, options)
    facts = sizing.compile_job(job, options)
    assert facts.fits and not facts.unknown
    assert all('data' not in axes for _, axes, *_ in facts.collectives)
    assert {kind for kind, *_ in facts.between_slices} == {'all-reduce'}
    print(report.text(job.case, facts))
