"""`python -m neodragon_jax.sizes` lists every component of a checkpoint, with the parameters of the golden manifest."""

from __future__ import annotations

import json

import pytest

from neodragon_jax import sizes
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.random_params import PRESETS
from support.goldens import GOLDENS, TINY_CHECKPOINT


def test_every_component_of_a_checkpoint_is_in_the_table(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['sizes', 'tiny'])
    sizes.main()
    *rows, total = [line.split() for line in capsys.readouterr().out.splitlines()]
    inside = {path.parent.name for path in TINY_CHECKPOINT.glob('*/config.json')}
    assert inside <= {row[0] for row in rows} and len(rows) == len(PRESETS['tiny'])
    assert total[0] == 'all'
    for column in (1, 3):
        assert sum(int(row[column].replace(',', '')) for row in rows) == int(total[column].replace(',', ''))


@pytest.mark.parametrize('folder', [folders.STUDENT_ADAPTER, folders.VIDEO_VAE])
def test_parameters_are_those_of_the_reference(folder):
    (size,) = sizes.component_sizes({folder: PRESETS['full'][folder]})
    assert size.parameters == json.loads((GOLDENS / 'manifest_full.json').read_text())[folder]['params_total']
