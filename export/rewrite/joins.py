"""Concatenations at rank 3, because a device returned long ones of rank 2 in the wrong order.

On a Snapdragon 8 Elite, a quantized concatenation of matrices with more than about 320 rows in total came out as eight
interleaved parts: every number right, in the wrong rows. Neither the compiled graph nor the simulator shows it.
Concatenations of rank 3 kept their order. `check_joins` refuses compiled graphs that have such a concatenation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from export.rewrite.onnx_graph import attribute, constants_of, new_constant, replace_nodes, shapes_of
from neodragon_jax.base.errors import InputError

# Most rows of a concatenation of rank 2: below the 320 at which the order was lost, because the exact limit is unknown.
MOST_ROWS = 256


def join_at_rank_three(graph: onnx.GraphProto) -> None:
    """Give long concatenations of rank 2 a leading axis of size 1, in place."""
    shapes, constants = shapes_of(graph), constants_of(graph)
    nodes = []
    for node in graph.node:
        shape = shapes[node.output[0]] if node.op_type == 'Concat' else []
        if len(shape) != 2 or shape[0] <= MOST_ROWS:
            nodes.append(node)
            continue
        parts = []
        for position, name in enumerate(node.input):
            part = f'{node.output[0]}_part{position}'
            wanted = new_constant(graph, constants, f'{part}_shape', np.array([1, *shapes[name]], np.int64))
            nodes.append(helper.make_node('Reshape', [name, wanted], [part], name=part))
            parts.append(part)
        joined, axis = f'{node.output[0]}_joined', attribute(node, 'axis') % 2
        wanted = new_constant(graph, constants, f'{joined}_shape', np.array(shape, np.int64))
        nodes.append(helper.make_node('Concat', parts, [joined], name=joined, axis=axis + 1))
        nodes.append(helper.make_node('Reshape', [joined, wanted], node.output, name=node.name))
    replace_nodes(graph, nodes)


def check_joins(nodes: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise InputError if a compiled graph has a long concatenation of rank 2.

    Args:
      nodes, tensors: of the graph that QNN dumps, by name.
    """
    for name, node in nodes.items():
        dims = tensors[node['output_names'][0]]['dims'] if node['type'] == 'Concat' else []
        if len(dims) == 2 and dims[0] > MOST_ROWS:
            raise InputError(
                f'{name}: joins {dims[0]} rows at rank 2, which a Snapdragon 8 Elite returns in another order. Join at '
                'rank 3 (export.rewrite.joins).'
            )
