"""AdaRound worker: runs aimet-onnx in its own Python environment; started by `export.quantize.adaround`.

    PYTHON adaround_worker.py FOLDER

Input, in FOLDER: graph.onnx, request.json ({"nodes": {weight: node}, "iterations": N}) and the graph inputs
calls-*.npz. Output: rounded.npz with `levels/WEIGHT` (int8, shape of the weight) and `scales/WEIGHT` (float32, one per
output channel). The script imports nothing from this project, which is not installed in that environment.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

# aimet's quantization rules for Snapdragon 8 Elite, the default target of the export.
SETTINGS = 'htp_v79'
_INT8 = 127


def main(folder: pathlib.Path) -> None:
    """Round the requested weights; write their levels and scales."""
    # aimet-onnx is not installed in the environment that runs the type checker.
    import aimet_onnx  # pyright: ignore[reportMissingImports]
    from aimet_onnx.quantsim import QuantizationSimModel  # pyright: ignore[reportMissingImports]

    request = json.loads((folder / 'request.json').read_text())
    calls = [dict(np.load(path)) for path in sorted(folder.glob('calls-*.npz'))]
    on_gpu = 'CUDAExecutionProvider' in onnxruntime.get_available_providers()
    sim: Any = QuantizationSimModel(
        onnx.load(folder / 'graph.onnx'),
        param_type=aimet_onnx.int8,
        activation_type=aimet_onnx.int16,
        config_file=SETTINGS,
        providers=['CUDAExecutionProvider' if on_gpu else 'CPUExecutionProvider'],
    )
    nodes = list(request['nodes'].values())
    aimet_onnx.apply_adaround(sim, calls, num_iterations=request['iterations'], nodes_to_include=nodes)
    constants = {tensor.name: tensor for tensor in sim.model.model.graph.initializer}
    rounded = {}
    for name in request['nodes']:
        values = numpy_helper.to_array(constants[name])
        scales = np.array([channel.delta for channel in sim.qc_quantize_op_dict[name].get_encodings()], np.float32)
        if scales.shape != values.shape[:1]:
            raise SystemExit(f'{name}: {scales.size} scales for {values.shape[0]} output channels')
        # aimet returns values between two levels, closer to the chosen one.
        levels = np.rint(values / scales.reshape(-1, *[1] * (values.ndim - 1))).clip(-_INT8, _INT8)
        rounded |= {f'levels/{name}': levels.astype(np.int8), f'scales/{name}': scales}
    np.savez(folder / 'rounded.npz', **rounded)


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]))
