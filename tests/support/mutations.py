"""Seeded damage of files, JSON values and safetensors files, and the check that it is refused in one line."""

from __future__ import annotations

import copy
import json
import pathlib
import random
import struct
import time
from collections.abc import Callable
from typing import Any

LONGEST_S = 10.0

# Wrong values: other types, ends of ranges, and numbers that would cause endless work.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 2**31, 10**18, 10**40, 0.5, -0.5, 1e-9, 1e30, '', '18',
    'x' * 300, 'gelu', 'line\nbreak', '\u2028', [], [1], [0, 0], [None], ['a', 'b'], {}, {'a': 1},
    [[1, 2], [3]], [[[[1]]]],
]  # fmt: skip
# Content that is not the JSON of an object, or that no writer makes.
TEXTS: list[bytes] = [
    b'', b'{', b'[]', b'null', b'3', b'"x"', b'\xff\xfe', b'\xef\xbb\xbf{}', b'[' * 20_000,
    b'{"a":' * 200 + b'1' + b'}' * 200,
    b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": ' + b'7' * 5000 + b'}',
    b'{"a": "\\ud800"}', b'{"a": "\x00"}', b'{"a": 1}garbage', b'{' + b' ' * 1000,
]  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return a file with one kind of damage."""
    data, size = bytearray(content), max(len(content), 1)
    kind = rng.randrange(6)
    if kind == 0:  # truncated
        return bytes(data[: rng.randrange(size)])
    place, length = rng.randrange(size), rng.randrange(1, 64)
    if kind == 1:  # flipped bits
        for _ in range(rng.randrange(1, 12)):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == 2:  # zeros
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif kind == 3:  # noise
        data[place : place + length] = rng.randbytes(len(data[place : place + length]))
    elif kind == 4:  # doubled
        data[place:place] = data[place : place + length]
    else:  # cut out
        del data[place : place + length]
    return bytes(data)


def outcome(call: Callable[[], Any], *refusals: type[Exception]) -> Any:
    """Return the result of a call, or None where it refuses its input in one line; nothing else may happen."""
    start = time.monotonic()
    try:
        result = call()
    except refusals as error:
        assert str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 1000, str(error)
        str(error).encode()
        result = None
    assert time.monotonic() - start < LONGEST_S
    return result


def change_value(rng: random.Random, value: Any) -> Any:
    """Return a JSON object with one value, at any depth, replaced, removed, repeated or renamed."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    holder, key = rng.choice(places)
    kind = rng.choice(['replace', 'replace', 'replace', 'near', 'remove', 'rename'])
    if kind == 'remove':
        del holder[key]
    elif kind == 'rename' and isinstance(holder, dict):
        holder[f'{key}{rng.choice("sx_")}'] = holder.pop(key)
    elif kind == 'near' and isinstance(holder[key], int | float):
        holder[key] = rng.choice([-holder[key], holder[key] + 1, holder[key] * 2, holder[key] * 1000, str(holder[key])])
    elif isinstance(holder[key], list) and holder[key] and rng.random() < 0.3:
        holder[key] = rng.choice([holder[key][:-1], holder[key] * 2, holder[key] * 5000, holder[key][0]])
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _places(value: Any) -> Any:
    """Yield (holder, key) of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def split(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    content = path.read_bytes()
    (size,) = struct.unpack('<Q', content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(path: pathlib.Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """Write a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)


def change_header(rng: random.Random, path: pathlib.Path) -> str:
    """Damage the header of a safetensors file so that it is certainly invalid; return the kind of damage."""
    header, data = split(path)
    names = [name for name in header if name != '__metadata__']
    kind, change = rng.choice(list(HEADER_DAMAGE.items()))
    change(rng, header, names)
    join(path, header, data)
    return kind


def _of_unequal_sides(header: dict[str, Any], names: list[str]) -> list[str]:
    return [name for name in names if len(set(header[name]['shape'])) > 1]


def _reverse(rng: random.Random, header: dict[str, Any], names: list[str]) -> None:
    name = rng.choice(_of_unequal_sides(header, names))
    shape = header[name]['shape']
    header[name]['shape'] = shape[::-1] if shape[::-1] != shape else sorted(shape)


def _flatten(rng: random.Random, header: dict[str, Any], names: list[str]) -> None:
    name = rng.choice(_of_unequal_sides(header, names))
    size = 1
    for side in header[name]['shape']:
        size *= side
    header[name]['shape'] = [size]


def _add_axis(rng: random.Random, header: dict[str, Any], names: list[str]) -> None:
    header[rng.choice(names)]['shape'].append(1)


def _retype(rng: random.Random, header: dict[str, Any], names: list[str]) -> None:
    others = {'F32': ['I32', 'U32'], 'F16': ['I16', 'U16'], 'BF16': ['I16', 'U16']}
    name = rng.choice(names)
    header[name]['dtype'] = rng.choice(others[header[name]['dtype']])


def _to_bytes(rng: random.Random, header: dict[str, Any], names: list[str]) -> None:
    entry = header[rng.choice(names)]
    entry['shape'] = [entry['data_offsets'][1] - entry['data_offsets'][0]]
    entry['dtype'] = rng.choice(['BOOL', 'I8', 'U8', 'F8_E4M3', 'F8_E5M2'])


def _rename(rng: random.Random, header: dict[str, Any], names: list[str]) -> None:
    header[rng.choice(['x', '../x', 'a\nb', '\u2028', 'decoder.weight'])] = header.pop(rng.choice(names))


def _drop(rng: random.Random, header: dict[str, Any], names: list[str]) -> None:
    del header[rng.choice(names)]


def _move(rng: random.Random, header: dict[str, Any], names: list[str]) -> None:
    offsets = header[rng.choice(names)]['data_offsets']
    offsets[rng.randrange(2)] += rng.choice([-4, 4, 10**15])


def _misuse(rng: random.Random, header: dict[str, Any], names: list[str]) -> None:
    entry = header[rng.choice(names)]
    key = rng.choice(['dtype', 'shape', 'data_offsets'])
    entry[key] = rng.choice([value for value in VALUES if value != entry[key]])


HEADER_DAMAGE: dict[str, Callable[[random.Random, dict[str, Any], list[str]], None]] = {
    'reverse': _reverse,
    'flatten': _flatten,
    'add_axis': _add_axis,
    'retype': _retype,
    'to_bytes': _to_bytes,
    'rename': _rename,
    'drop': _drop,
    'move': _move,
    'misuse': _misuse,
}
