"""AdaRound: weights are rounded up or down by an optimization of each layer's output error.

Source: Nagel et al., arXiv 2004.10568, as implemented in aimet-onnx. Because aimet-onnx requires PyTorch, it runs in a
separate environment: the path of its Python interpreter is an option, and that interpreter runs `adaround_worker.py`.

    python3.11 -m venv AIMET && AIMET/bin/pip install aimet-onnx==2.42.0
    python -m export --checkpoint CKPT --graphs video_decoder --adaround AIMET/bin/python --out export/
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from export.graphs.table import Feeds
from export.rewrite.onnx_graph import constants_of
from neodragon_jax.base.errors import InputError

# Graphs of convolutions whose weights AdaRound rounds.
GRAPHS = ('super_resolution', 'video_decoder')
# Maximum number of recorded calls to optimize the rounding on.
CALLS = 64
PACKAGE = 'aimet-onnx'
# Run as a file: the project is not installed in the other environment.
_WORKER = 'export.quantize.adaround_worker'
_WORKER_FILE = pathlib.Path(__file__).parents[2].joinpath(*_WORKER.split('.')).with_suffix('.py')


@dataclasses.dataclass(frozen=True)
class AdaRound:
    """An environment that has aimet-onnx, and the number of iterations.

    Attributes:
      python: path of its interpreter.
      iterations: optimization steps per layer; aimet's default is 10,000.
      version: of aimet-onnx.
    """

    python: str
    iterations: int
    version: str


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Quantized weights of convolutions.

    Attributes:
      levels: weight -> int8 [O, ...].
      scales: weight -> float32 [O], one per output channel.
    """

    levels: Mapping[str, np.ndarray]
    scales: Mapping[str, np.ndarray]

    def value(self, name: str) -> np.ndarray:
        """Return the dequantized weight in float32."""
        levels = self.levels[name]
        return np.float32(levels) * self.scales[name].reshape(-1, *[1] * (levels.ndim - 1))


def find(python: str, iterations: int) -> AdaRound:
    """Find an environment by the path of its interpreter.

    Raises:
      InputError: there is no such program, or aimet-onnx is not installed for it.
    """
    if iterations < 1:
        raise InputError(f'--adaround-iterations is {iterations}; give at least 1.')
    remedy = (
        f'Make an environment: python3.11 -m venv AIMET && AIMET/bin/pip install {PACKAGE}==2.42.0; then give its '
        'bin/python.'
    )
    if shutil.which(python) is None:
        raise InputError(f'--adaround {python}: no such program. {remedy}')
    asked = f'import aimet_onnx, importlib.metadata as m; print(m.version("{PACKAGE}"))'
    done = subprocess.run([python, '-c', asked], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ['no message'])[-1]
        raise InputError(f'--adaround {python}: {PACKAGE} does not work there ({last}). {remedy}')
    return AdaRound(python, iterations, done.stdout.split()[-1])


def round_weights(settings: AdaRound, source: pathlib.Path, feeds: Iterable[Feeds]) -> Rounding:
    """Round the weights of a float graph's convolutions with AdaRound.

    A weight that several layers share, such as the layers of a decoder's frames, is optimized at the first of them.

    Args:
      feeds: recorded inputs; the first CALLS are used.
    Raises:
      InputError: aimet-onnx failed.
    """
    with tempfile.TemporaryDirectory(dir=source.parent, prefix='.adaround-') as scratch:
        folder = pathlib.Path(scratch)
        model = onnx.load(source)
        nodes = _one_weight_per_layer(model.graph)
        onnx.save(model, folder / 'graph.onnx')
        for number, call in enumerate(itertools.islice(feeds, CALLS)):
            arrays: dict[str, Any] = dict(call)
            np.savez(folder / f'calls-{number:03d}.npz', **arrays)
        (folder / 'request.json').write_text(json.dumps({'nodes': nodes, 'iterations': settings.iterations}))
        # The standard error of the worker shows its progress bar and its error messages.
        done = subprocess.run([settings.python, _WORKER_FILE, scratch], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise InputError(
                f'--adaround {settings.python}: {PACKAGE} {settings.version} failed on {source.name} with status '
                f'{done.returncode}; its message is above. Leave the option out to round to the nearest.'
            )
        with np.load(folder / 'rounded.npz') as rounded:
            levels, scales = ({name: rounded[f'{kind}/{name}'] for name in nodes} for kind in ('levels', 'scales'))
    return Rounding(levels, scales)


def _one_weight_per_layer(graph: onnx.GraphProto) -> dict[str, str]:
    """Duplicate weights that several convolutions share; return the first convolution's name by weight."""
    constants, nodes = constants_of(graph), {}
    for node in graph.node:
        name = node.input[1] if node.op_type == 'Conv' else None
        if name is None or name not in constants:
            continue
        if name in nodes:
            copy = onnx.TensorProto.FromString(constants[name].SerializeToString())
            copy.name = node.input[1] = f'{name}_of_{node.name}'
            graph.initializer.append(copy)
        else:
            nodes[name] = node.name
    return nodes


def apply(graph: onnx.GraphProto, rounding: Rounding) -> dict[str, np.ndarray]:
    """Replace the weights of a graph by their rounded values, in place; return the scales of the replaced weights."""
    scales = {}
    for name, tensor in constants_of(graph).items():
        if name in rounding.levels:
            tensor.CopyFrom(numpy_helper.from_array(rounding.value(name), name))
            scales[name] = rounding.scales[name]
    return scales
