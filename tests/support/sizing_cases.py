"""Cases and facts of the tests of the sizing, and the settings of a small program."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import dmd as dmd_config
from support.goldens import TINY_CHECKPOINT
from train.aot import chips as aot_chips
from train.aot.report import Case, Facts

GIB = 2**30
# Shares of the peak rate that attention kernels reach, forward and backward.
ON_V5E = aot_chips.CHIPS['v5e'].attention


def tiny_settings(**changes) -> ConfigDict:
    settings = dmd_config.get_config('tiny')
    settings.checkpoint = str(TINY_CHECKPOINT)
    settings.loop.update(changes)
    return settings


def case(**changes) -> Case:
    base = Case('p', '0', 1.0, aot_chips.topology('v5e:4x4'), (1, 16, 1), 32, 96, {'remat': 'full'}, 16 * 100e12)
    return dataclasses.replace(base, **changes)


FITS = Facts(
    fits=True,
    needed_bytes=4 * GIB,
    lower_s=10,
    compile_s=100,
    memory={'arguments': 3 * GIB, 'output': 3 * GIB, 'alias': 3 * GIB, 'temporaries': GIB, 'code': 0},
    flops=110e12,
    cycles=2.5e9,
    calibrated_cycles=1.5e9,
    collectives=[('all-gather', 'fsdp', 30e9, 0.3), ('all-reduce', 'fsdp', 10e9, 0.1)],
    kernels={'splash_mha_fwd': (18, ON_V5E[0] * 197e12 / 2)},
)
