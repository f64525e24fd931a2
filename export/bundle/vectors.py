"""Test vectors of a bundle: one recorded call of every graph, and one recorded video with portable noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from export.bundle.contents import Draft, GraphFiles
from export.graphs.runners import Call, OnnxSession
from export.graphs.table import VIDEO_TARGET_DB
from export.host.recording import Scenes, Video
from export.measure.snr import snr_db

# The minimum ratio on a device is the ratio on the CPU minus this margin, or the target if that is lower.
MARGIN_DB = 3.0


def write_call(draft: Draft, name: str, graph: GraphFiles, call: Call) -> dict[str, Any]:
    """Write a call of a graph, inputs then outputs in the manifest's order; return its part of the manifest."""
    outputs = OnnxSession(graph.onnx).run(call.inputs)
    reached = min(snr_db(call.outputs[output], outputs[output]) for output in graph.compared)
    arrays = [call.inputs[tensor] for tensor in graph.specs['inputs']]
    arrays += [call.outputs[tensor] for tensor in graph.specs['outputs']]
    content = b''.join(np.ascontiguousarray(array, '<f4').tobytes() for array in arrays)
    return {
        'file': draft.write(content, f'vectors/{name}.bin'),
        'compared': list(graph.compared),
        'cpu_db': round(reached, 2),
        'minimum_db': round(min(reached - MARGIN_DB, graph.target_db), 2),
    }


def write_video(draft: Draft, scenes: Scenes, video: Video, reached: float | None) -> dict[str, Any]:
    """Write the recorded video of the first evaluation prompt; return its part of the manifest.

    Args:
      scenes: the evaluation prompts, whose noise is portable.
      reached: ratio of the last latent frame when the exported graphs make the video; None if it was not measured.
    """
    assert scenes.portable and video.latents is not None and video.frames is not None
    latents, frames = video.latents[0], video.frames[0]
    image, first = scenes.image(0), video.first_frame
    content = np.ascontiguousarray(latents, '<f4').tobytes()
    return {
        'prompt': scenes.prompts[0],
        'seed': scenes.portable_seed(0),
        'prompt_tables': {
            **{
                name: draft.table(f'vectors.video.{name}', np.asarray(getattr(video.prompt, name))[index])
                for name, index in (('text', 0), ('mask', 0), ('pooled', slice(None)))
            },
            'first_frame': None if first is None else draft.table('vectors.video.first_frame', np.asarray(first)[0, 0]),
        },
        'image': None if image is None else draft.table('vectors.video.image', image[0, 0]),
        'latents': {'file': draft.write(content, 'vectors/video.latents.bin'), 'shape': list(latents.shape)},
        'frames': {'file': draft.write(frames.tobytes(), 'vectors/video.frames.bin'), 'shape': list(frames.shape)},
        'cpu_db': reached and round(reached, 2),
        'minimum_db': reached and round(min(reached - MARGIN_DB, VIDEO_TARGET_DB), 2),
    }
