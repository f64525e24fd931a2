"""Bytes that an instruction of a compiled TPU program moves between its core and the chip's memory.

Arrays are stored in tiles, such as T(8,128): the last dimensions are padded to whole tiles. An array whose layout names
a memory space, such as S(1), is in the core's own memory and moves no bytes.
"""

from __future__ import annotations

import math
import re

from train.aot.hlo import Computation, Instruction, Shape

# Operations that read or write only a part of an operand.
UPDATE, SLICE = 'dynamic-update-slice', 'dynamic-slice'


def stored_bytes(shape: Shape) -> float:
    """Return the bytes of an array in the chip's memory, padded to tiles; 0 for an array in a core's memory."""
    if 'S(' in shape.layout:
        return 0.0
    order = [int(axis) for axis in re.findall(r'\d+', shape.layout.partition(':')[0])]
    tile = re.search(r'T\((\d+),(\d+)\)', shape.layout)
    dims = list(shape.dims)
    if tile and len(order) == len(dims) >= 2:
        for axis, size in zip(order, reversed(tile.groups()), strict=False):
            dims[axis] = math.ceil(dims[axis] / int(size)) * int(size)
    return shape.bytes * math.prod(dims) / shape.size if shape.size else 0.0


def moved_bytes(instruction: Instruction, computation: Computation, opcodes: set[str]) -> float:
    """Return the bytes that an instruction reads and writes.

    Args:
      computation: holds the instruction.
      opcodes: those of the instruction and of everything fused into it.
    """
    size_of = lambda source: sum(stored_bytes(shape) for shape in source.shapes)
    result = size_of(instruction)
    read = [size_of(computation[name]) for name in instruction.operands if name in computation]
    if UPDATE in opcodes:
        # Written in place: the array that is updated moves only the new part, which is read and written.
        whole = max([result, *read])
        parts = [size for size in read if size < 0.9 * whole]
        return sum(parts) + max(parts, default=0.0)
    if SLICE in opcodes:
        return result + sum(min(size, result) for size in read)
    return result + sum(read)
