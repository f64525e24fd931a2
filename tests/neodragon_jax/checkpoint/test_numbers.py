"""Tests of the check of stored numbers: which are refused, and that it takes little longer than reading them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.weights import Weights, largest

TYPES = [np.dtype(name) for name in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)]
types = pytest.mark.parametrize('dtype', TYPES, ids=str)


@types
@pytest.mark.parametrize('values', [[], [0.0], [-0.0], [-3, 1], [3, -1], [2.5, 2.5], [-6e-8], [[1, -2], [3, -4]]])
def test_the_largest_absolute_value_is_that_of_numpy(dtype, values):
    numbers = np.asarray(values, dtype)
    assert largest(numbers) == max((abs(float(value)) for value in numbers.ravel()), default=0.0)
    assert largest(np.asarray(-2.5, dtype)) == 2.5


@types
def test_all_patterns_of_bits(dtype):
    """Subnormal numbers, infinities and NaNs of both signs among them."""
    numbers = np.frombuffer(np.random.default_rng(0).bytes(dtype.itemsize << 12), dtype)
    with np.errstate(invalid='ignore'):  # of NaNs that signal
        values = numbers.astype(np.float64)
    assert math.isfinite(largest(numbers)) == bool(np.isfinite(values).all())
    finite = numbers[np.isfinite(values)]
    assert largest(finite) == np.abs(finite.astype(np.float64)).max()
    for special in (np.nan, -np.nan, np.inf, -np.inf):
        assert not math.isfinite(largest(np.asarray([1, special, -2], dtype)))


@types
@pytest.mark.parametrize(('value', 'reason'), [(np.nan, 'not finite'), (-np.inf, 'not finite'), (-2e18, r'2\.0e\+18')])
def test_numbers_that_cannot_be_computed_with_are_refused(tmp_path, dtype, value, reason):
    if dtype == np.float16 and math.isfinite(value):
        pytest.skip('float16 has no such number')
    safetensors.numpy.save_file({'a': np.asarray([1, value, 2], dtype)}, tmp_path / 'model.safetensors')
    with pytest.raises(InputError, match=f'tensor a has values .*{reason}'):
        list(Weights(tmp_path).read(['a']))


@types
def test_a_file_of_zeros_is_refused_whatever_their_sign(tmp_path, dtype):
    zeros = np.zeros((4, 4), dtype)
    tensors = {'a': zeros, 'b': -zeros, 'c': np.zeros(4, dtype)}
    safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(InputError, match='2 of 3 tensors are all zeros'):
        list(Weights(tmp_path).read(tensors))


@types
def test_checking_takes_little_longer_than_reading(tmp_path, dtype):
    """NumPy judges numbers of 16 bits one by one: an encoder of 5 billion took a minute instead of a quarter."""
    path = tmp_path / 'model.safetensors'
    numbers = np.random.default_rng(0).standard_normal((1 << 11, 1 << 11)).astype(dtype)
    safetensors.numpy.save_file({'a': numbers}, path)
    weights = Weights(tmp_path)

    def read_alone() -> None:
        with safetensors.safe_open(path, framework='numpy') as file:
            file.get_tensor('a')

    assert _seconds(lambda: list(weights.read(['a']))) < 4 * _seconds(read_alone)


def _seconds(function: Callable[[], object]) -> float:
    """Return the shortest processor time of several calls; that of other processes does not count."""
    times = []
    for _ in range(7):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)
