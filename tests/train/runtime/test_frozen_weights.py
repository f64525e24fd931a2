"""Frozen weights: a run continues with those that it began with, on any mesh, and with no others."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from support.toy_program import LinearSource, Toy, checkpoint_steps, config_for
from train.runtime.frozen_weights import identities, require_same
from train.runtime.loop import run
from train.runtime.sharding import MeshConfig, make_mesh, param_shardings, put


def weights(change: float = 0.0) -> dict:
    rng = np.random.default_rng(3)
    parts = {name: {'kernel': rng.normal(size=(8, 16)).astype(np.float32)} for name in ('teacher', 'embedder')}
    parts['teacher']['kernel'][5, 3] += change
    return parts | {'mask': np.ones(3, bool), 'negative': rng.normal(size=4).astype(jax.numpy.bfloat16)}


def placed(parts: dict, *mesh: int) -> dict:
    made = make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))])
    return put(parts, param_shardings(made, parts))


@pytest.mark.parametrize('mesh', [(8, 1, 1), (2, 4, 1), (1, 2, 4)], ids=str)
def test_identities_do_not_depend_on_the_mesh(mesh):
    alone = identities(placed(weights(), 1, 1, 1))
    assert identities(placed(weights(), *mesh)) == alone
    assert alone.keys() == weights().keys()
    assert (alone['negative']['types'], alone['mask']['types']) == ('bfloat16', 'bool')


def test_a_change_an_exchange_and_a_lack_are_found():
    parts = weights()
    recorded = identities(placed(parts, 1, 1, 1))
    require_same(recorded, recorded, 'RUN')
    with pytest.raises(InputError, match=r'RUN: .* other frozen weights, teacher: give the weights that it began with'):
        require_same(recorded, identities(placed(weights(1e-6), 1, 1, 1)), 'RUN')
    exchanged = parts | {'teacher': parts['embedder'], 'embedder': parts['teacher']}
    with pytest.raises(InputError, match='weights, embedder, teacher:'):
        require_same(recorded, identities(placed(exchanged, 1, 1, 1)), 'RUN')
    del parts['mask']
    for pair in ((recorded, identities(placed(parts, 1, 1, 1))), (identities(placed(parts, 1, 1, 1)), recorded)):
        with pytest.raises(InputError, match='weights, mask:'):
            require_same(*pair, 'RUN')
    assert identities({}) == {}


@dataclasses.dataclass
class Frozen(Toy):
    """A toy with a frozen part beside its teacher."""

    scale: float = 1.0
    dtype: str = 'float32'

    def frozen(self):
        return super().frozen() | {'scale': np.full(3, self.scale).astype(self.dtype)}


def test_a_run_does_not_continue_with_other_weights(tmp_path):
    run(Frozen(), LinearSource(), config_for(tmp_path, steps=4))
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file() and path.name != '.lock'}
    with pytest.raises(InputError, match=r'its checkpoint was trained with other frozen weights, scale: .*workdir'):
        run(Frozen(scale=2.0), LinearSource(), config_for(tmp_path, steps=8))
    after = {path: path.read_bytes() for path in before}
    assert {path for path in before if before[path] != after[path]} == set()
    # The same weights, and those of another precision.
    run(Frozen(), LinearSource(), config_for(tmp_path, steps=8))
    run(Frozen(dtype='float16'), LinearSource(), config_for(tmp_path, steps=12))
    assert checkpoint_steps(tmp_path)[-1] == 12


def test_a_checkpoint_without_identities_continues(tmp_path, monkeypatch):
    monkeypatch.setattr('train.runtime.loop._place', lambda loader, key, weights: _old_place(loader, key))
    run(Frozen(), LinearSource(), config_for(tmp_path, steps=4))
    monkeypatch.undo()
    run(Frozen(scale=2.0), LinearSource(), config_for(tmp_path, steps=8))
    with pytest.raises(InputError, match='scale'):
        run(Frozen(), LinearSource(), config_for(tmp_path, steps=12))


def _old_place(loader, key):
    return {'data': loader.get_state(), 'key': np.asarray(jax.random.key_data(key)).tolist()}
