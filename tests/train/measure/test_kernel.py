"""The schedule of the attention kernel: its instructions, the share of the peak rate, and the real compiler's."""

from __future__ import annotations

import importlib.util

import pytest

from neodragon_jax.base.errors import InputError
from train.aot.chips import CHIPS, topology
from train.measure import kernel

# As the compiler writes it: a legend, then instructions with the depth of their loop.
SCHEDULE = """= control target key start
LH: loop header
= control target key end

     0   :  { %s15 = smov [#allocation3]  ;;  %s16 = smov [#allocation4] }
   0x1   :  { %s11 = sshll.u32 %s60505_s0, 4 }
   0x2 LB: > { %722 = vst.msk [vmem:[#allocation14]] %v640 }
   0x3   : > { %723 = vst.msk [vmem:[#allocation14]] %v640 }
"""


def test_instructions_of_a_schedule():
    assert kernel.instructions(SCHEDULE) == 4
    with pytest.raises(ValueError, match='a loop inside a step'):
        kernel.instructions(SCHEDULE + '   0x4   : > > { %724 = vst.msk [vmem:[#allocation14]] %v640 }\n')


def test_share_of_the_peak_rate():
    """A tile of 896 rows and 1,792 keys at head dimension 64: the cycles its products need / those it takes."""
    chip = CHIPS['v5e']
    ideal = 2 * 2 * 896 * 1792 * 64 / chip.flops_per_cycle
    assert kernel.share(SCHEDULE, 2, chip) == pytest.approx(ideal / 4)


def test_without_the_compiler_the_way_out_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match=r'libtpu, the TPU compiler, is not installed; run: pip install'):
        topology('v5e:1x1').compile_devices()
    assert kernel.main(['--topology', 'v5e:3x1']) == 2
    assert 'v5e:3x1' in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed: pip install .[tpu]')
@pytest.mark.slow
def test_shares_of_the_sizing_are_those_of_the_compiler(capfd):
    assert kernel.main([]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ('v5e', 'v6e'), strict=True):
        forward, backward = (f'{rate:.1%}' for rate in CHIPS[name].attention)
        assert line.startswith(f'{name}:1x1: forward {forward} ') and f'backward {backward} ' in line
