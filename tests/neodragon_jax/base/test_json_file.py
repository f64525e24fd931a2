"""Tests of strict JSON: every error names file, key, value and remedy in one line."""

from __future__ import annotations

import pathlib
import re
from typing import Annotated, Any

import pytest
from pydantic import Field

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import checked, read_json


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'{"a": 1, "a": 2}', "not valid JSON \\(key 'a' appears twice\\)"),
        (b'{"a": [1, NaN]}', r'a\[1\] is nan; it must be a finite number'),
        (b'{"a": {"b": 1e999}}', r'a\.b is inf; it must be a finite number'),
        (b'{"a": ' + b'9' * 5000 + b'}', r'a is a number of 5,000 digits; at most 100 are read'),
        (b'{"a": ' + b'[' * 40 + b']' * 40 + b'}', 'is nested more than 32 levels deep'),
        (b'[' * 100_000, 'more than 32 levels of lists and objects'),
        (b'{"a": "\\ud800"}', 'a has a character that is not valid Unicode'),
        (b'{"a": "\xff"}', 'not UTF-8 at byte 7'),
        (b'{"a": 1', r'not valid JSON \(.*line 1 column 8'),
        (b'[]', r'the content is \[\]; it must be an object'),
        (b'{"a": "' + b'x' * 2000 + b'"}', 'larger than 1,000 bytes'),
    ],
)
def test_refusals(tmp_path, content, message):
    path = tmp_path / 'file.json'
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_json(path, dict[str, Any], max_bytes=1000 if b'xx' in content else 200_000)
    assert str(caught.value).startswith(f'{path}: ') and len(str(caught.value).splitlines()) == 1


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r'cannot be read \(No such file or directory\)'):
        read_json(tmp_path / 'file.json', dict[str, Any])


def test_content_is_returned_as_it_is(tmp_path):
    path = tmp_path / 'file.json'
    path.write_text('{"a": [1, 2.5, "x", null, true, {"b": -1e-3}], "c": 123456789012345678901234567890}')
    want = {'a': [1, 2.5, 'x', None, True, {'b': -1e-3}], 'c': 123456789012345678901234567890}
    assert read_json(path, dict[str, Any]) == want


@pytest.mark.parametrize(
    ('value', 'kind', 'message'),
    [
        ('18', int, "x is '18'; it must be a valid integer"),
        (True, int, 'x is True; it must be a valid integer'),
        (1, bool, 'x is 1; it must be a valid boolean'),
        (1.0, int, 'x is 1.0; it must be a valid integer'),
        (0, Annotated[int, Field(ge=1)], 'x is 0; it must be greater than or equal to 1'),
        (float('nan'), float, 'x is nan; it must be a finite number'),
        ((1, 'a'), tuple[int, ...], r"x\[1\] is 'a'; it must be a valid integer"),
        ((), Annotated[tuple[int, ...], Field(min_length=1)], r'x is \[\]; .* at least 1 item'),
        (None, int | tuple[int, ...], 'x is None; it must be a valid array or a valid integer'),
        (object(), int, 'x is <object object at .*; it must be a valid integer'),
        ('a\nb', int, r"x is 'a\\nb'; it must be"),
    ],
)
def test_types_and_ranges(value, kind, message):
    with pytest.raises(InputError, match=f'f: {message}'):
        checked(value, kind, 'f', 'x')


@pytest.mark.parametrize(
    ('value', 'kind'),
    [(3, int), (3, float), ((1, 2), tuple[int, ...]), ([1, 2], list[int]), (None, int | None), ('a', str)],
)
def test_accepted_values(value, kind):
    assert checked(value, kind, 'f', 'x') == value


# Texts that this process, or a library in it, has just made.
OWN = {
    'neodragon_jax/base/json_file.py',
    'train/shapes/text_encoders.py',  # the tokenizers library
    'export/qnn/static_view.py',  # the QNN library
    # They run in another environment, which does not have this package.
    'export/quantize/adaround_worker.py',
    'train/measure/against_torch/torch_worker.py',
}


def test_all_json_is_read_here():
    """No module reads JSON on its own, so that limits, types and messages are the same for every file."""
    root, found = pathlib.Path(__file__).parents[3], set()
    for package in ('neodragon_jax', 'train', 'export'):
        for path in (root / package).rglob('*.py'):
            name = path.relative_to(root).as_posix()
            if re.search(r'\bjson\.loads?\(', path.read_text()) and not name.startswith('export/player/'):
                found.add(name)
    assert found == OWN
