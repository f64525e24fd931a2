"""ONNX Runtime's model class with an index, for graphs of thousands of nodes.

For every tensor, the library's quantizer looks through all nodes and all constants of the graph. For a UNet, that takes
most of the time of the quantization. The results here are the same.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence, Set
from typing import Any
from unittest import mock

import onnx
from onnxruntime.quantization import base_quantizer, qdq_quantizer
from onnxruntime.quantization.onnx_model import ONNXModel


class IndexedModel(ONNXModel):
    """A model that knows the readers of each tensor, and its constants by name.

    The index grows with the graph. Any change other than an added node, an added constant or a replaced input of all
    nodes discards its part of the index.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self._forget_nodes()
        self._forget_constants()

    def _forget_nodes(self) -> None:
        self._readers: dict[str, list[onnx.NodeProto]] = collections.defaultdict(list)
        self._nodes_seen = 0

    def _forget_constants(self) -> None:
        self._constants: dict[str, onnx.TensorProto] = {}
        self._constants_seen = 0

    def replace_input_of_all_nodes(self, old_input_name: str, new_input_name: str) -> None:
        """Let all nodes that read one tensor read another."""
        nodes = self.model.graph.node
        for node in nodes[self._nodes_seen :]:
            for name in node.input:
                self._readers[name].append(node)
        self._nodes_seen = len(nodes)
        for node in self._readers.pop(old_input_name, []):
            ONNXModel.replace_node_input(node, old_input_name, new_input_name)
            self._readers[new_input_name].append(node)

    def get_initializer(self, name: str) -> onnx.TensorProto | None:
        """Return a constant, or None."""
        constants = self.model.graph.initializer
        for constant in constants[self._constants_seen :]:
            self._constants.setdefault(constant.name, constant)
        self._constants_seen = len(constants)
        return self._constants.get(name)

    def add_initializer(self, tensor: onnx.TensorProto) -> None:
        """Add a constant, unless there is one of this name."""
        if self.get_initializer(tensor.name) is None:
            self.model.graph.initializer.append(self._check_init(tensor))

    def initializer_extend(self, inits: Sequence[onnx.TensorProto]) -> None:
        """Add constants."""
        self.model.graph.initializer.extend(self._check_init(constant) for constant in inits)

    # Changes that discard a part of the index.

    def replace_node_input(self, node: onnx.NodeProto, old_input_name: str, new_input_name: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Let one node read another tensor."""
        ONNXModel.replace_node_input(node, old_input_name, new_input_name)
        self._forget_nodes()

    def replace_input_of_nodes(self, old_input_name: str, new_input_name: str, node_names_set: Set[str]) -> None:
        """Let some nodes read another tensor."""
        super().replace_input_of_nodes(old_input_name, new_input_name, node_names_set)
        self._forget_nodes()

    def remove_node(self, node: onnx.NodeProto) -> None:
        """Remove a node."""
        super().remove_node(node)
        self._forget_nodes()

    def remove_initializer(self, tensor: onnx.TensorProto) -> None:
        """Remove a constant."""
        self.get_initializer(tensor.name)  # all are in the index now
        super().remove_initializer(tensor)
        removed = self._constants_seen - len(self.model.graph.initializer)
        if removed:
            del self._constants[tensor.name]
            self._constants_seen -= removed

    def clean_initializers(self) -> Any:
        """Remove the constants that no node reads."""
        self._forget_constants()
        return super().clean_initializers()

    def topological_sort(self) -> None:
        """Sort the nodes."""
        self._forget_nodes()
        super().topological_sort()


@contextlib.contextmanager
def indexed_quantizer() -> Iterator[None]:
    """Let a quantizer that is created inside the block use IndexedModel."""
    models: list[IndexedModel] = []

    def make(model: onnx.ModelProto) -> IndexedModel:
        models.append(IndexedModel(model))
        return models[-1]

    def find(name: str, constants: object) -> onnx.TensorProto | None:
        """Find a constant in place of `find_by_name`, which quantizers give all constants of their model."""
        del constants
        return models[-1].get_initializer(name)

    with (
        mock.patch.object(base_quantizer, 'ONNXModel', make),
        mock.patch.object(base_quantizer, 'find_by_name', find),
        mock.patch.object(qdq_quantizer, 'find_by_name', find),
    ):
        yield
