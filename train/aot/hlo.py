"""Parser of a compiled program's HLO text: computations, instructions, loops and groups of devices.

Source of the format: `HloModule.to_string` of XLA.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 'token': 0, 'opaque': 0, 'c64': 8, 'c128': 16}

_SHAPE = re.compile(r'([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%([\w.\-]+) = ')
_NAME = re.compile(r'%([\w.\-]+)')


class Shape(NamedTuple):
    """Type, dimensions and layout of an array; the layout is the text in braces, such as 1,0:T(8,128)S(1)."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ''

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        if self.dtype in BYTES:
            return self.size * BYTES[self.dtype]
        digits = re.search(r'\d+', self.dtype)
        return self.size * (int(digits.group()) / 8 if digits else 0)


@dataclasses.dataclass(slots=True)
class Instruction:
    """An instruction: one line of a computation."""

    name: str
    shapes: list[Shape]  # of the result; several for a tuple
    opcode: str
    operands: list[str]
    argument: str  # the text in parentheses: the value of a constant, the number of a parameter
    attributes: str
    root: bool

    def called(self, *names: str) -> list[str]:
        """Return the computations that attributes such as `calls` and `body` name."""
        pattern = rf'\b(?:{"|".join(names)})=(?:\{{([^}}]*)\}}|%([\w.\-]+))'
        return [name for many, one in re.findall(pattern, self.attributes) for name in _NAME.findall(many) or [one]]


Computation = dict[str, Instruction]


@dataclasses.dataclass
class Module:
    """A parsed program."""

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Module:
    """Return the computations of an HLO module's text."""
    computations: dict[str, Computation] = {}
    entry, current, lines = '', None, []
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current, lines = header.group(2), []
                entry = current if header.group(1) else entry
        elif line == '}':
            instructions = (_instruction(line) for line in lines)
            computations[current] = {instruction.name: instruction for instruction in instructions}
            current = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        else:
            lines[-1] += line  # attributes may hold line breaks
    first_line = text.partition('\n')[0]
    partitions, replicas = (
        int(match.group(1)) if (match := re.search(rf'{name}=(\d+)', first_line)) else 1
        for name in ('num_partitions', 'replica_count')
    )
    return Module(computations, entry, partitions * replicas)


def _instruction(line: str) -> Instruction:
    """Return a parsed line: [ROOT] %name = shape opcode(operands), attributes."""
    match = _INSTRUCTION.match(line)
    assert match is not None
    rest = line[match.end() :]
    if rest.startswith('('):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(' ')
    opcode, _, rest_arguments = rest[end:].strip().partition('(')
    close = _closing(rest_arguments, 1)
    argument = rest_arguments[:close]
    shapes = [Shape(dtype, integers(dims), layout) for dtype, dims, layout in _SHAPE.findall(rest[:end])]
    return Instruction(
        name=match.group(2),
        shapes=shapes,
        opcode=opcode,
        operands=_NAME.findall(argument),
        argument=argument,
        attributes=rest_arguments[close + 1 :],
        root=bool(match.group(1)),
    )


def _closing(text: str, depth: int) -> int:
    """Return the index of the parenthesis that closes `depth` open ones, or the one that `text` begins with."""
    for place in re.finditer(r'[()]', text):
        depth += 1 if place.group() == '(' else -1
        if depth == 0:
            return place.start()
    raise ValueError(f'no closing parenthesis in {text[:80]!r}')


def integers(text: str) -> tuple[int, ...]:
    """Return the integers of a comma-separated list."""
    return tuple(int(number) for number in text.split(',') if number)


def trip_count(module: Module, loop: Instruction, computation: Computation) -> int | None:
    """Return the trip count of a loop, or None if it cannot be read from the text."""
    known = re.search(r'known_trip_count\W+n\W+(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.called('condition')[0]]
    for compare, operands in _comparisons(module, condition):
        bounds = [_constant(operand) for operand in operands]
        places = [re.search(r'index=(\d+)', operand.attributes) if operand else None for operand in operands]
        for bound, place in ((bounds[1], places[0]), (bounds[0], places[1])):
            if bound is None or place is None:
                continue
            direction = re.search(r'direction=(\w+)', compare.attributes)
            start = _initial(loop, computation, int(place.group(1)))
            inclusive = direction is not None and direction.group(1) in ('LE', 'GE')
            return abs(bound - (start or 0)) + inclusive
    return None


def _comparisons(module: Module, condition: Computation) -> Iterator[tuple[Instruction, list[Instruction | None]]]:
    """Yield the comparisons of a loop's condition with their operands, including those inside fusions."""
    for instruction in condition.values():
        if instruction.opcode == 'compare':
            yield instruction, [condition.get(name) for name in instruction.operands]
        elif instruction.opcode == 'fusion':
            body = module.computations[instruction.called('calls')[0]]
            outer = {number: condition.get(name) for number, name in enumerate(instruction.operands)}
            for inner in body.values():
                if inner.opcode == 'compare':
                    operands = [body[name] for name in inner.operands]
                    yield inner, [outer[int(o.argument)] if o.opcode == 'parameter' else o for o in operands]


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != 'constant':
        return None
    return int(instruction.argument) if re.fullmatch(r'-?\d+', instruction.argument) else None


def _initial(loop: Instruction, computation: Computation, place: int) -> int | None:
    """Return the initial value of an element of a loop's tuple, or None if it is not a constant."""
    state = computation.get(loop.operands[0])
    while state is not None and state.opcode == 'copy':
        state = computation.get(state.operands[0])
    if state is None or state.opcode != 'tuple':
        return None
    value = computation.get(state.operands[place])
    while value is not None and value.opcode in ('copy', 'bitcast'):
        value = computation.get(value.operands[0])
    return _constant(value)


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Return the devices of the first group of a collective, as indices into the program's device order.

    Raises:
      ValueError: the format of the groups is unknown.
    """
    if match := re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', attributes):
        return integers(match.group(1))
    if match := re.search(r'replica_groups=\[(\d+),(\d+)\]<=(\S*\d[\])])', attributes):
        return tuple(_iota(match.group(3))[: int(match.group(2))].tolist())
    pattern = r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^{]*|[\d,]+)\))?\s*\{([^}]*)\}'
    if match := re.search(pattern, attributes):
        mesh, order, axes = match.groups()
        places = _mesh_group(mesh, axes)
        if not order:
            return places
        ids = _iota(order) if order.startswith('[') else np.array(integers(order))
        return tuple(ids[list(places)].tolist())
    groups = re.search(r'replica_groups=(?!\{\})\S+', attributes)
    if groups:
        raise ValueError(f'unknown form of groups: {groups.group()}')
    return tuple(range(devices))


def _iota(text: str) -> np.ndarray:
    """Return device numbers in an order such as [2,4]T(1,0): 0, 1, 2, ... reshaped, transposed and flattened."""
    match = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
    assert match is not None, text
    dims = integers(match.group(1))
    return np.arange(math.prod(dims)).reshape(dims).transpose(integers(match.group(2) or '') or None).reshape(-1)


def _mesh_group(mesh: str, axes: str) -> tuple[int, ...]:
    """Return the first group over some axes of a mesh such as 'a'=4,'b'=2; an axis may be a part, 'a':(2)2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    strides = {name: math.prod(list(sizes.values())[place + 1 :]) for place, name in enumerate(sizes)}
    offsets = np.zeros(1, int)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        count, stride = sizes[name], strides[name]
        if part:
            count, stride = int(part), stride * sizes[name] // (int(before) * int(part))
        offsets = (offsets[:, None] + np.arange(count)[None] * stride).reshape(-1)
    return tuple(offsets.tolist())


def group_axes(group: tuple[int, ...], mesh_shape: Mapping[str, int]) -> str:
    """Return the mesh axes along which the devices of a group differ, such as 'data,fsdp'; '' for one device."""
    places = np.stack(np.unravel_index(group, tuple(mesh_shape.values())), axis=1)
    return ','.join(name for name, column in zip(mesh_shape, places.T, strict=True) if len(set(column.tolist())) > 1)
