"""Export and quantization of a large model piece by piece; the ONNX graphs of the pieces are stitched into one.

Quantizing a whole stage of the full-size denoiser takes tens of gigabytes. Piece by piece, at most one block is in
memory. Each block is exported; its ranges are measured on the outputs of the preceding float blocks; its own float
outputs, computed in the same pass, become the inputs of the next block; it is quantized and appended to the result.

In the result, a value between pieces is quantized once, by the piece that produces it. An input that several pieces
read is also quantized once.
"""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from export.graphs.table import Feeds, PhoneGraph
from export.graphs.to_onnx import to_onnx
from export.quantize.ranges import OnOutputs
from export.quantize.two_parts import write_in_two_parts
from export.rewrite.for_htp import convert_before_cutting, fuse_gains, remove_vector_reshapes, shrink_transposes
from export.rewrite.onnx_graph import drop_unused
from neodragon_jax.base.errors import InputError

# Constants of at least this many bytes go to a file beside the graph.
_EXTERNAL_BYTES = 1024
_QUANTIZING = ('QuantizeLinear', 'DequantizeLinear')
_NOTHING: Callable[[str], object] = lambda text: None


class Quantize(Protocol):
    """Function that writes the quantized form of a float graph, given its calibration inputs."""

    def __call__(
        self, source: pathlib.Path, destination: pathlib.Path, feeds: Iterable[Feeds], *, on_outputs: OnOutputs | None
    ) -> object:
        """Write `destination`; `on_outputs` gets the float outputs for every input."""
        ...


def export_chain(graph: PhoneGraph, path: pathlib.Path, on_piece: Callable[[str], object] = _NOTHING) -> int:
    """Write the float ONNX graph of a chain; return its number of operations.

    Args:
      path: of the graph; its weights go to `path`.data beside it.
      on_piece: called with the name of each finished piece.
    """
    with _scratch(path) as scratch, Stitcher(graph, path) as result:
        for piece in graph.pieces:
            result.append(export_piece(piece, scratch / 'piece.onnx', graph.fused))
            on_piece(piece.name)
    return result.operations


def quantize_chain(
    graph: PhoneGraph,
    path: pathlib.Path,
    feeds: Iterable[Feeds],
    quantize: Quantize,
    on_piece: Callable[[str], object] = _NOTHING,
) -> None:
    """Write the quantized ONNX graph of a chain.

    Args:
      path: of the graph; its weights go to `path`.data beside it.
      feeds: calibration inputs of the whole graph, read one by one and kept on disk.
      quantize: `to_w8a16`, or a function like it.
      on_piece: called with the name of each finished piece.
    """
    with _scratch(path) as scratch, Stitcher(graph, path) as result:
        spool = _Spool(scratch, feeds)
        for number, piece in enumerate(graph.pieces, 1):
            source, doubled, destination = (scratch / f'{name}.onnx' for name in ('piece', 'doubled', 'quantized'))
            export_piece(piece, source, graph.fused)
            if piece.in_two_parts:
                write_in_two_parts(source, doubled)
            given = doubled if piece.in_two_parts else source
            on_outputs = spool.write if number < len(graph.pieces) else None
            quantize(given, destination, spool.read(piece.inputs), on_outputs=on_outputs)
            model = onnx.load(destination)
            if graph.fused:
                fuse_gains(model.graph)
                convert_before_cutting(model.graph)
            result.append(model)
            del model
            spool.keep({name for later in graph.pieces[number:] for name in later.inputs})
            on_piece(piece.name)


def export_piece(piece: PhoneGraph, path: pathlib.Path, fused: bool) -> onnx.ModelProto:
    """Write the float ONNX graph of a piece and return it; `fused` applies the rewrites that precede quantization."""
    for old in path.parent.glob(f'{path.name}*'):
        old.unlink()  # the exporter appends to an existing weight file
    to_onnx(piece, path)
    model = onnx.load(path)
    if fused:
        remove_vector_reshapes(model.graph)
        shrink_transposes(model.graph)
    add_pre_process_metadata(model)
    onnx.save(model, path)
    return model


@contextlib.contextmanager
def _scratch(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary folder on the same disk as the result."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.pieces-') as folder:
        yield pathlib.Path(folder)


class _Spool:
    """Samples on disk: one folder per sample, one file per value."""

    def __init__(self, folder: pathlib.Path, feeds: Iterable[Feeds]) -> None:
        self._folder = folder / 'samples'
        self._count = 0
        for self._count, sample in enumerate(feeds, 1):
            self.write(self._count - 1, sample)
        if not self._count:
            raise InputError('no calibration inputs; record at least one.')

    def read(self, names: Iterable[str]) -> Iterator[Feeds]:
        """Yield some of the values of every sample."""
        names = list(names)
        for number in range(self._count):
            yield {name: np.load(self._folder / str(number) / f'{name}.npy') for name in names}

    def keep(self, names: Collection[str]) -> None:
        """Remove all other values."""
        for path in self._folder.glob('*/*.npy'):
            if path.stem not in names:
                path.unlink()

    def write(self, number: int, values: Feeds) -> None:
        """Add values to a sample."""
        folder = self._folder / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in values.items():
            np.save(folder / f'{name}.npy', array)


class Stitcher:
    """Context manager that appends the graphs of pieces to a graph on disk; the graph is written on exit.

    No weights are held in memory.

    Attributes:
      operations: number of nodes so far, without QuantizeLinear and DequantizeLinear.
    """

    def __init__(self, graph: PhoneGraph, path: pathlib.Path) -> None:
        self.operations = 0
        self._graph, self._path = graph, path
        self._result = onnx.ModelProto()
        self._result.graph.name = graph.name
        self._values = {name: name for name in graph.inputs}  # value between pieces -> its name in the result
        # (value, quantized type) -> names of the quantized value, its scale and its zero point.
        self._quantized: dict[tuple[str, int], list[str]] = {}
        self._dequantized: dict[tuple[str, ...], str] = {}  # names of those three -> the value

    def __enter__(self) -> Stitcher:
        self._data = (self._path.parent / f'{self._path.name}.data').open('wb')
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._data.close()
        if kind is None:
            drop_unused(self._result.graph)
            add_pre_process_metadata(self._result)
            onnx.save(self._result, self._path)

    def append(self, model: onnx.ModelProto) -> None:
        """Append the graph of a piece; its inputs are inputs of the whole or outputs of earlier pieces."""
        graph, result = model.graph, self._result.graph
        if not result.node:
            self._result.ir_version = model.ir_version
            self._result.opset_import.extend(model.opset_import)
        prefix = f'{model.graph.name}.'
        names: dict[str, str] = {value.name: value.name for value in graph.output if value.name in self._graph.outputs}
        names |= {value.name: self._values[value.name] for value in graph.input}

        def here(name: str) -> str:
            return names.get(name, prefix + name) if name else name

        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        repeated = {node.name for node in graph.node if self._is_repeated(node, names, here, types)}
        used = set()
        for node in graph.node:
            if node.name in repeated:
                continue
            copy = result.node.add()
            copy.CopyFrom(node)
            copy.name = prefix + node.name
            copy.input[:], copy.output[:] = map(here, node.input), map(here, node.output)
            used.update(copy.input)
            self._remember(copy, node, types)
            self.operations += node.op_type not in _QUANTIZING
        for tensor in graph.initializer:
            if here(tensor.name) in used and tensor.name not in names:
                self._add_constant(tensor, here(tensor.name))
        self._add_ends(graph, names)
        for value in graph.output:
            self._pass_on(value.name, here(value.name), graph, here, types)

    def _is_repeated(
        self, node: onnx.NodeProto, names: dict[str, str], here: Callable[[str], str], types: dict[str, int]
    ) -> bool:
        """Return whether the result already contains the output of a node; if so, rename it for its readers."""
        inputs = [here(name) for name in node.input]
        if node.op_type == 'QuantizeLinear':
            # Ranges may differ in the last digit: the parameters of the first QuantizeLinear apply.
            known = self._quantized.get((inputs[0], types[node.input[2]]))
            if known:
                names.update(zip((node.output[0], *node.input[1:3]), known, strict=True))
            return bool(known)
        if node.op_type == 'DequantizeLinear' and tuple(inputs) in self._dequantized:
            names[node.output[0]] = self._dequantized[tuple(inputs)]
            return True
        return False

    def _remember(self, copy: onnx.NodeProto, node: onnx.NodeProto, types: dict[str, int]) -> None:
        """Record the quantization of graph inputs and of values converted from them."""
        if copy.op_type == 'QuantizeLinear' and self._from_input(copy.input[0]):
            self._quantized[copy.input[0], types[node.input[2]]] = [copy.output[0], *copy.input[1:3]]
        if copy.op_type == 'DequantizeLinear' and copy.input[0] in {entry[0] for entry in self._quantized.values()}:
            self._dequantized[tuple(copy.input)] = copy.output[0]

    def _from_input(self, name: str) -> bool:
        return name in self._graph.inputs or name in self._dequantized.values()

    def _pass_on(
        self, name: str, value: str, graph: onnx.GraphProto, here: Callable[[str], str], types: dict[str, int]
    ) -> None:
        """Make an output of a piece available to later pieces, with its quantization if it has one."""
        self._values[name] = value
        (producer,) = (node for node in graph.node if name in node.output)
        if producer.op_type == 'DequantizeLinear':
            self._quantized[value, types[producer.input[2]]] = [here(key) for key in producer.input]

    def _add_constant(self, tensor: onnx.TensorProto, name: str) -> None:
        """Add a constant; the data of a large one goes to the weight file."""
        content = numpy_helper.to_array(tensor).tobytes()
        added = self._result.graph.initializer.add()
        added.CopyFrom(tensor)
        added.name = name
        if len(content) < _EXTERNAL_BYTES:
            return
        for field in ('raw_data', 'float_data', 'int32_data', 'int64_data'):
            added.ClearField(field)
        added.data_location = onnx.TensorProto.EXTERNAL
        place = {'location': self._data.name.rsplit('/')[-1], 'offset': self._data.tell(), 'length': len(content)}
        added.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(v)) for key, v in place.items())
        self._data.write(content)

    def _add_ends(self, graph: onnx.GraphProto, names: dict[str, str]) -> None:
        """Add the inputs and outputs of a piece that are inputs and outputs of the whole graph."""
        have = {value.name for value in self._result.graph.input}
        new = [value for value in graph.input if value.name in self._graph.inputs and value.name not in have]
        self._result.graph.input.extend(new)
        self._result.graph.output.extend(value for value in graph.output if names.get(value.name) == value.name)
