"""The published files of LPIPS become the file that the trainings read."""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from typing import Any

import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from train import lpips_weights
from train.vae.perceptual import load_lpips, tensor_names
from train.vae.torch_file import parse_torch, read_torch

OLD, NEW = 'old', 'new'


class Storage:
    """A storage of a written file."""

    def __init__(self, key: str, values: np.ndarray) -> None:
        self.key, self.values = key, values


class Tensor:
    """A tensor of a written file."""

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.arguments = storage, offset, shape, strides, False, collections.OrderedDict()

    def __reduce__(self) -> Any:
        return sys.modules['torch._utils']._rebuild_tensor_v2, self.arguments


class Pickler(pickle.Pickler):
    """Writes storages as PyTorch does, by reference."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        return 'storage', sys.modules['torch'].FloatStorage, obj.key, 'cpu', len(obj.values)


@pytest.fixture(autouse=True)
def _names(monkeypatch):
    """Install the names that a file of PyTorch refers to."""
    torch, utils = types.ModuleType('torch'), types.ModuleType('torch._utils')
    torch.FloatStorage = type('FloatStorage', (), {'__module__': 'torch'})  # pyright: ignore[reportAttributeAccessIssue]

    def rebuild(*_: Any) -> None: ...

    rebuild.__module__, rebuild.__qualname__ = 'torch._utils', '_rebuild_tensor_v2'
    utils._rebuild_tensor_v2 = rebuild  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, 'torch', torch)
    monkeypatch.setitem(sys.modules, 'torch._utils', utils)


def pickled(found: Any) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(found)
    return file.getvalue()


def written(tensors: dict[str, Tensor], kind: str) -> bytes:
    """Return the content of a .pth file."""
    storages = {tensor.arguments[0].key: tensor.arguments[0] for tensor in tensors.values()}
    raw = {key: storage.values.astype('<f4').tobytes() for key, storage in storages.items()}
    content = pickled(collections.OrderedDict(tensors))
    file = io.BytesIO()
    if kind == NEW:
        with zipfile.ZipFile(file, 'w') as archive:
            archive.writestr('archive/data.pkl', content)
            archive.writestr('archive/byteorder', 'little')
            for key, values in raw.items():
                archive.writestr(f'archive/data/{key}', values)
        return file.getvalue()
    head = b''.join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}))
    blocks = b''.join(struct.pack('<q', len(values) // 4) + values for values in raw.values())
    return head + content + pickle.dumps(list(raw), 2) + blocks


def plain(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Return tensors with a storage each."""
    made = {}
    for number, (name, array) in enumerate(arrays.items()):
        strides = tuple(step // array.itemsize for step in array.strides)
        made[name] = Tensor(Storage(str(number), array.ravel()), 0, array.shape, strides)
    return made


def features(network: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return random tensors of a backbone and of the weights of the features, by their published names."""
    shapes = random_weights(network)
    backbone = {f'features.{name.split(".", 2)[2]}': array for name, array in shapes.items() if name.startswith('net.')}
    return backbone, {name: array for name, array in shapes.items() if name.startswith('lin')}


def random_weights(network: str) -> dict[str, np.ndarray]:
    """Return random tensors of LPIPS in the published shapes."""
    rng, channels, made = np.random.default_rng(0), 3, {}
    for name in tensor_names(network):
        if name.startswith('net.') and name.endswith('weight'):
            side, count = KERNELS[network][sum(key.endswith('bias') for key in made)]
            made[name] = rng.standard_normal((count, channels, side, side), np.float32)
            channels = count
        elif name.startswith('net.'):
            made[name] = rng.standard_normal(channels, np.float32)
        else:
            made[name] = rng.random((1, channels, 1, 1), np.float32)
    return made


# Side and number of the kernels of every convolution.
KERNELS = {
    'alex': [(11, 64), (5, 192), (3, 384), (3, 256), (3, 256)],
    'vgg': [(3, 64 * 2 ** min(block, 3)) for block, count in enumerate((2, 2, 3, 3, 3)) for _ in range(count)],
}


@pytest.mark.parametrize('kind', [OLD, NEW])
def test_tensors_share_storages(kind):
    values = np.arange(12, dtype=np.float32)
    shared = Storage('s', values)
    tensors = {'whole': Tensor(shared, 0, (3, 4), (4, 1)), 'turned': Tensor(shared, 1, (2, 3), (1, 4))}
    found = parse_torch(written(tensors, kind), 'weights.pth')
    assert np.array_equal(found['whole'], values.reshape(3, 4))
    assert np.array_equal(found['turned'], values.reshape(3, 4)[:, 1:3].T)


@pytest.mark.parametrize('kind', [OLD, NEW])
def test_damaged_files_are_refused_in_one_line(kind):
    content = written(plain({'a': np.ones((2, 3), np.float32)}), kind)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(400):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        try:
            parse_torch(bytes(damaged[: rng.integers(len(content) // 2, len(content) + 1)]), 'weights.pth')
        except InputError as error:
            refused += 1
            assert str(error).startswith('weights.pth: ') and '\n' not in str(error).strip()
    assert refused > 200


@pytest.mark.parametrize('kind', [OLD, NEW])
def test_values_of_a_big_endian_machine_are_refused(kind):
    content = written(plain({'a': np.ones((2, 3), np.float32)}), kind)
    if kind == NEW:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(file, 'w') as other:
            for name in archive.namelist():
                other.writestr(name, b'big' if name.endswith('byteorder') else archive.read(name))
        content = file.getvalue()
    else:
        content = content.replace(pickle.dumps({'little_endian': True}, 2), pickle.dumps({'little_endian': False}, 2))
    with pytest.raises(InputError, match='written on a big-endian machine'):
        parse_torch(content, 'weights.pth')


def test_no_code_of_a_file_runs(tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return pathlib.Path.touch, (tmp_path / 'ran',)

    head = b''.join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}))
    (tmp_path / 'evil.pth').write_bytes(head + pickle.dumps({'a': Evil()}, 2))
    with pytest.raises(InputError, match=r'the file refers to .*, which no weights need'):
        read_torch(tmp_path / 'evil.pth', '--linear')
    assert not (tmp_path / 'ran').exists()


def test_published_files_become_weights(tmp_path, capsys):
    backbone, linear = features('alex')
    # The classifier of the network is not needed.
    (tmp_path / 'alexnet.pth').write_bytes(written(plain(backbone | {'classifier.1.bias': np.ones(9, 'f4')}), NEW))
    with zipfile.ZipFile(tmp_path / 'lpips.whl', 'w') as wheel:
        wheel.writestr('lpips/weights/v0.1/alex.pth', written(plain(linear), OLD))
    out = tmp_path / 'new' / 'lpips.safetensors'
    given = ['--linear', str(tmp_path / 'lpips.whl'), '--backbone', str(tmp_path / 'alexnet.pth')]
    assert lpips_weights.main([*given, '--out', str(out)]) == 0
    assert 'LPIPS by alex, 15 tensors' in capsys.readouterr().out
    module, params = load_lpips(out)
    assert module.network == 'alex'
    kernel = backbone['features.3.weight'].transpose(2, 3, 1, 0)
    assert np.array_equal(params['conv_1']['kernel'], kernel)
    assert np.array_equal(params['weights_4'], linear['lin4.model.1.weight'].ravel())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'--linear': 'none.whl'}, 'none.whl: no such file. Run: pip download'),
        ({'--linear': 'alexnet.pth'}, '--linear: has no tensor lin0.model.1.weight'),
        ({'--backbone': 'alex.pth'}, '--backbone: neither VGG16 nor AlexNet'),
        ({'--backbone': 'none.pth'}, 'none.pth: no such file'),
        ({'--out': 'lpips.npz'}, 'give a name that ends in .safetensors'),
    ],
)
def test_wrong_files_are_refused(tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    backbone, linear = features('alex')
    pathlib.Path('alexnet.pth').write_bytes(written(plain(backbone), NEW))
    pathlib.Path('alex.pth').write_bytes(written(plain(linear), OLD))
    given = {'--linear': 'alex.pth', '--backbone': 'alexnet.pth', '--out': 'lpips.safetensors'} | change
    assert lpips_weights.main([text for pair in given.items() for text in pair]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob('*.safetensors'))


def test_both_networks_are_told_apart():
    for network in ('vgg', 'alex'):
        backbone, _ = features(network)
        assert lpips_weights.network_of(backbone) == network


@pytest.mark.slow
def test_the_published_wheel_is_read(tmp_path):
    """Features of the five layers of both networks, all weighted at least 0."""
    download = ['pip', 'download', '--quiet', '--no-deps', '--dest', str(tmp_path), 'lpips==0.1.4']
    if subprocess.run([sys.executable, '-m', *download]).returncode:
        pytest.skip('lpips could not be downloaded from PyPI')
    (wheel,) = tmp_path.iterdir()
    for network in ('vgg', 'alex'):
        linear = lpips_weights.read_linear(wheel, network)
        _, wanted = features(network)
        assert {name: array.shape for name, array in linear.items()} == {
            name: array.shape for name, array in wanted.items()
        }
        assert min(array.min() for array in linear.values()) >= 0
