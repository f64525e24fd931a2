"""The notebook is that of its script, and the script's cells run on a CPU with the preset `tiny`."""

from __future__ import annotations

import json
import runpy

import numpy as np
import pytest

from support.goldens import ROOT
from train.runtime.metrics import read_metrics

SCRIPT = ROOT / 'docs' / 'notebook' / 'first_run.py'


@pytest.fixture(scope='module')
def maker():
    return runpy.run_path(str(ROOT / 'docs' / 'make_notebook.py'))


def test_the_notebook_is_made_from_the_script(maker):
    content = SCRIPT.with_suffix('.ipynb').read_text()
    assert content == maker['text_of'](SCRIPT.read_text()), f'run python docs/make_notebook.py {SCRIPT}'
    notebook = json.loads(content)
    assert len({cell['id'] for cell in notebook['cells']}) == len(notebook['cells']) > 10
    code = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert 'import jax' in code[1] and '# %%' not in content


def test_cells_are_converted(maker):
    made = maker['notebook']('# %% [markdown]\n# # Title\n#\n# text\n\n# %%\n# a comment\nx = 1\n')
    text, code = (''.join(cell['source']) for cell in made['cells'])
    assert text == '# Title\n\ntext' and code == '# a comment\nx = 1'
    assert [cell['cell_type'] for cell in made['cells']] == ['markdown', 'code']
    with pytest.raises(ValueError, match='before its first'):
        maker['notebook']('x = 1\n# %%\n')


@pytest.mark.long
def test_the_cells_run(tmp_path, monkeypatch):
    """Each training runs from where the one before has ended; the student's result is loaded and generates."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('PRESET', 'tiny')
    monkeypatch.setenv('OUT', str(tmp_path))
    names = runpy.run_path(str(SCRIPT))
    assert names['video'].frames.shape == (17, 64, 64, 3)
    steps = [row['step'] for row in read_metrics(tmp_path / 'tiny' / 'dmd')]
    assert steps == [1, 2]
    frames = names['new_video'].frames
    assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 64, 3)
    assert (tmp_path / 'tiny' / 'new_student.mp4').stat().st_size > 0
