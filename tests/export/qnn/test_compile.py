"""Context binaries: the same graph gives the same bytes wherever they are written."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil

import pytest

from export.qnn.chipsets import find_target
from export.qnn.compile import compile_graph, compile_together
from export.qnn.htp import HtpSession
from neodragon_jax.base.errors import InputError
from support.linear_graph import write_linear


def digests(folder: pathlib.Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != 'metadata.json'  # it contains the compile time
    }


@pytest.mark.qnn
def test_binaries_do_not_depend_on_where_they_are(tmp_path, monkeypatch):
    target, found, together = find_target('sm8750'), [], []
    for place in ('a', 'a much longer/folder name'):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        model = write_linear(folder)
        compile_graph('linear', model, folder / 'out', target, 'w8a16', {})
        found.append(digests(folder / 'out'))
        other = shutil.copyfile(model, folder / 'other.onnx')
        compile_together('both', {'linear': model, 'other': other}, folder / 'both', target, 'w8a16', {})
        together.append(digests(folder / 'both'))
    assert len(found[0]) == 2 and found[0] == found[1]
    assert len(together[0]) == 3 and together[0] == together[1]
    monkeypatch.chdir(tmp_path / 'a')
    relative = pathlib.Path(os.path.relpath(tmp_path / 'a' / 'linear.onnx'))
    compile_graph('linear', relative, pathlib.Path('relative'), target, 'w8a16', {})
    assert digests(tmp_path / 'a' / 'relative') == found[0]


@pytest.mark.qnn
def test_full_disk_is_not_blamed_on_the_graph(tmp_path):
    model = write_linear(tmp_path)
    (tmp_path / 'out_qnn.bin').symlink_to('/dev/full')
    with pytest.raises(InputError, match=r'not writable: .* Free space there') as error:
        HtpSession(model, {'soc_model': '69', 'htp_arch': '79'}, context=tmp_path / 'out.onnx')
    assert 'operations' not in str(error.value) and str(tmp_path) in str(error.value)
