"""Tests of checkpoints with links to files that are gone, such as those of a cleaned cache: none counts as absent."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import is_there
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders, shipped
from neodragon_jax.checkpoint.results import find_teacher
from neodragon_jax.generation import defaults, safety
from neodragon_jax.generation.defaults import RELEASED
from neodragon_jax.generation.param_store import Store
from neodragon_jax.generation.student import with_student
from neodragon_jax.generation.tokens import Tokenizers
from support.goldens import TINY_CHECKPOINT
from support.sessions import open_session

WEIGHTS = 'diffusion_pytorch_model.safetensors'


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """A copy of the miniature, with a training result in it."""
    copy = pathlib.Path(shutil.copytree(TINY_CHECKPOINT, tmp_path / 'checkpoint'))
    shutil.copytree(copy / folders.TEACHER, copy / 'result' / folders.TEACHER)
    return copy


def load_adapter(root: pathlib.Path) -> object:
    return checkpoint.load(root / folders.STUDENT_ADAPTER)


@pytest.mark.parametrize(
    ('part', 'load'),
    [
        (defaults.FILE, defaults.read),
        (folders.SAFETY_CHECKER, lambda root: safety.load(root, Store())),
        (folders.FEATURE_EXTRACTOR, lambda root: safety.load(root, Store())),
        ('student.json', lambda root: with_student(RELEASED, root)),
        (f'{folders.T5_TOKENIZER}/tokenizer.json', Tokenizers.load),
        (folders.CLIP_L_TOKENIZER, Tokenizers.load),
        (folders.FIRST_FRAME_UNET, lambda root: open_session('--low-memory', root=root)),
        (folders.T5, lambda root: checkpoint.component_folder(root, folders.T5)),
        (f'{folders.STUDENT_ADAPTER}/{WEIGHTS}', load_adapter),
        (f'{folders.STUDENT_ADAPTER}/{WEIGHTS}.index.json', load_adapter),
        (f'result/{folders.TEACHER_ADAPTER}', lambda root: find_teacher(root, root / 'result', '--teacher')),
    ],
)
def test_a_link_to_nothing_is_refused_by_name(root, part, load):
    path = root / part
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to('/blobs/gone')
    with pytest.raises(InputError, match=f'{part}: a link to /blobs/gone, which does not exist; .* remove the link'):
        load(root)


def test_a_link_does_not_hide_behind_the_name_of_a_shipped_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path(shipped.DEFAULT).symlink_to('/blobs/gone')
    with pytest.raises(InputError, match='a link to /blobs/gone'):
        shipped.find(shipped.DEFAULT)


def test_links_in_a_circle_are_no_absent_part(tmp_path):
    (tmp_path / 'a').symlink_to('b')
    (tmp_path / 'b').symlink_to('a')
    with pytest.raises(InputError, match='a link to b'):
        is_there(tmp_path / 'a')
    (tmp_path / 'c').write_text('')
    (tmp_path / 'd').symlink_to('c')
    assert is_there(tmp_path / 'd') and not is_there(tmp_path / 'e')
