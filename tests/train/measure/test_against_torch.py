"""The comparison with PyTorch: the rehearsal on a CPU, its table, and errors before any work."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from train.measure.against_torch.__main__ import main
from train.measure.against_torch.case import TINY, Case, Measured
from train.measure.against_torch.report import equal_sizes, table

# An interpreter of an environment with PyTorch and diffusers, which this project does not install.
TORCH_PYTHON = os.environ.get('TORCH_PYTHON', sys.executable)


def measured(seconds: list[float], parameters: int = 1000) -> Measured:
    times = {'denoiser/2': seconds, 'distillation/2': [10 * second for second in seconds]}
    return Measured('gpu', {'jax': '1'}, parameters, times, {'denoiser/2': 3.0}, 5.0)


@pytest.mark.long
def test_the_rehearsal_measures_the_program_itself(tmp_path):
    """The denoiser has the size of the case, and the step runs: its metrics are finite."""
    assert main(['--tiny', '--sides', 'jax', '--stages', '0', '--rounds', '1', '--out', str(tmp_path)]) == 0
    result = json.loads((tmp_path / 'against_torch.json').read_text())
    (only,) = result['rounds']['jax']
    assert only['parameters'] == 289536, 'as many as the PyTorch side has'
    assert set(only['seconds']) == {'denoiser/0', 'distillation/0'}
    assert all(len(runs) == TINY.repeats and min(runs) > 0 for runs in only['seconds'].values())
    assert only['compile_s']['distillation/0'] > max(only['seconds']['distillation/0'])
    assert '| distillation | 0 |' in (tmp_path / 'against_torch.md').read_text()


def test_the_pytorch_side_has_as_many_parameters(tmp_path):
    found = subprocess.run([TORCH_PYTHON, '-c', 'import torch, diffusers'], capture_output=True)
    if found.returncode:
        pytest.skip('PyTorch and diffusers are not installed; name an interpreter with them in TORCH_PYTHON')
    options = ['--tiny', '--stages', '0,2', '--rounds', '1', '--torch-python', TORCH_PYTHON, '--out', str(tmp_path)]
    assert main(options) == 0
    rounds = json.loads((tmp_path / 'against_torch.json').read_text())['rounds']
    assert set(rounds['torch'][0]['seconds']) == set(rounds['jax'][0]['seconds'])
    assert rounds['torch'][0]['parameters'] == 289536
    assert '-' not in (tmp_path / 'against_torch.md').read_text().splitlines()[-1].split('|')[-2]


def test_the_table_has_medians_over_all_rounds():
    rounds = {
        'jax': [measured([1.0, 2.0, 9.0]), measured([2.0, 2.0, 1.0])],
        'torch': [measured([4.0, 4.0, 4.0]), measured([3.0, 5.0, 4.0])],
    }
    lines = table(dataclasses.replace(Case(), stages=(2,)), rounds).splitlines()
    assert '| denoiser | 2 | 1600 | 2.0000 (1.0000 to 9.0000) | 4.0000 (3.0000 to 5.0000) | 2.00 |' in lines
    assert '| distillation | 2 | 1600 | 20.0000 (10.0000 to 90.0000) | 40.0000 (30.0000 to 50.0000) | 2.00 |' in lines
    assert '* jax: gpu, jax 1, 1,000 parameters, peak 5.0 GB, first runs 3 s' in lines
    assert equal_sizes(rounds) and not equal_sizes(rounds | {'torch': [measured([1.0], parameters=999)]})


@pytest.mark.parametrize(
    ('arguments', 'complaint'),
    [
        (['--sides', 'jax,tensorflow'], "--sides has 'tensorflow'"),
        (['--stages', '3'], "--stages has '3'"),
        (['--batch', '0'], '--batch is 0'),
        (['--torch-python', 'no/such/python'], 'no/such/python: No such file or directory'),
        (['--torch-python', '/bin/false'], '--torch-python /bin/false: no PyTorch or diffusers there. Run: '),
    ],
)
def test_wrong_input_is_one_line(arguments, complaint, tmp_path, capsys):
    assert main([*arguments, '--out', str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
