"""Shapes kept on disk are those that are computed, and nothing damaged or outdated is believed."""

from __future__ import annotations

import pathlib

import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components, shape_cache
from neodragon_jax.checkpoint.abstract import tensor_shapes
from neodragon_jax.config.neodragon import TINY
from support.goldens import TINY_CHECKPOINT

KIND, CONFIG = 'T5EncoderWithProjection', TINY.t5


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    shape_cache.released_shapes.cache_clear()
    shape_cache._source.cache_clear()
    return tmp_path / 'neodragon_jax' / 'shapes'


@pytest.fixture
def traced(monkeypatch) -> list[str]:
    """The classes whose layers were traced."""
    seen: list[str] = []

    def counted(kind: str, config: object) -> object:
        seen.append(kind)
        return tensor_shapes(kind, config)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(shape_cache, 'tensor_shapes', counted)
    return seen


def again() -> shape_cache.Shapes:
    """Return the shapes as a new process would."""
    shape_cache.released_shapes.cache_clear()
    shape_cache._source.cache_clear()
    return shape_cache.released_shapes(KIND, CONFIG)


def test_a_second_process_traces_nothing(folder, traced):
    want = {name: shape.shape for name, shape in tensor_shapes(KIND, CONFIG).items()}
    assert again() == again() == want
    assert traced == [KIND] and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize('content', [b'', b'{"a": ', b'[1]', b'{"a": "b"}', b'\xff'])
def test_a_damaged_entry_is_computed_again(folder, traced, content):
    want = again()
    (entry,) = folder.iterdir()
    entry.write_bytes(content)
    assert again() == want == again()
    assert traced == [KIND] * 2


def test_other_source_has_other_entries(folder, traced, tmp_path, monkeypatch):
    again()
    (tmp_path / 'module.py').write_text('x = 1')
    monkeypatch.setattr(shape_cache, 'PACKAGE', tmp_path)
    again()
    (tmp_path / 'module.py').write_text('x = 2')
    again()
    assert traced == [KIND] * 3 and len(list(folder.iterdir())) == 3


def test_the_oldest_entries_are_removed(folder, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(shape_cache, 'MOST', 2)
    monkeypatch.setattr(shape_cache, 'PACKAGE', tmp_path)
    seen = []
    for number in range(4):
        (tmp_path / 'module.py').write_text(f'x = {number}')
        again()
        seen += [path for path in folder.iterdir() if path not in seen]
    assert len(seen) == 4 and sorted(folder.iterdir()) == sorted(seen[2:])


def test_a_folder_that_cannot_be_written_keeps_nothing(folder, traced):
    folder.parent.mkdir()
    folder.write_text('')
    assert again() == again()
    assert traced == [KIND] * 2


def test_a_component_of_other_shapes_is_still_refused(traced, monkeypatch):
    component = TINY_CHECKPOINT / 'text_encoder_3'
    module = components.load_module(component)
    components.open_weights(component, module)
    kept = shape_cache.released_shapes(KIND, module.config)  # pyright: ignore[reportAttributeAccessIssue]
    name = min(kept)
    monkeypatch.setitem(kept, name, (*kept[name], 1))
    with pytest.raises(InputError, match=name):
        components.open_weights(component, module)
    assert traced == [KIND]
