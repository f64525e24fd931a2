"""Order of a program's start: what the settings say is checked before data and weights are copied."""

from __future__ import annotations

import dataclasses

import pytest

from configs import dmd as dmd_settings
from neodragon_jax.base.errors import InputError
from train.dmd.program import RECIPE


class Loaded(Exception):
    """Data and weights would be loaded."""


@pytest.mark.parametrize(
    ('mesh', 'batch_size', 'message'),
    [
        ((1, 3, 1), 9, '3 does not divide the 8 devices'),
        ((2, 4, 1), 12, 'batch_size is 12, but data x fsdp of the mesh is 8; choose a multiple of 8'),
    ],
)
@pytest.mark.parametrize('dry_run', [False, True])
def test_devices_are_checked_before_anything_is_copied(mesh, batch_size, message, dry_run, tmp_path):
    settings = dmd_settings.get_config('tiny')
    settings.data, settings.workdir = 'gs://bucket/samples', str(tmp_path / 'run')
    settings.loop.mesh.data, settings.loop.mesh.fsdp, settings.loop.mesh.tensor = mesh
    settings.loop.batch_size = batch_size

    def load(given):
        raise Loaded

    with pytest.raises(InputError, match=message):
        dataclasses.replace(RECIPE, load=load).run(settings, dry_run)
