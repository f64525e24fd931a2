"""Test vectors of a bundle: one recorded call of every graph, and one video generated in JAX with portable noise."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from export.bundle.contents import Draft, GraphFiles
from export.graphs.runners import Call, OnnxSession
from export.graphs.table import VIDEO_TARGET_DB
from export.host.recording import Program
from export.measure.snr import snr_db
from neodragon_jax.generation import first_frame, pipeline
from neodragon_jax.pyramid.portable_noise import PortableNoise, PortablePictureNoise
from neodragon_jax.pyramid.sampler import Prompt, sample

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


@dataclasses.dataclass(frozen=True)
class Request:
    """A video to generate.

    Attributes:
      prompt: without modifier.
      modifier: appended to it.
      negative: negative prompt of the guidance.
      image: given first frame in [-1, 1]; None generates it with the first-frame model or the denoiser.
      seed: seed of the portable noise.
    """

    prompt: str
    modifier: str = ''
    negative: str = ''
    image: Float[np.ndarray, 'H W 3'] | None = None
    seed: int = 0


def write_video(draft: Draft, program: Program, exported: Program | None, request: Request) -> dict[str, Any]:
    """Generate one video in JAX and write its latents and frames; return its part of the manifest.

    Args:
      program: the whole program in JAX.
      exported: the same program over the exported graphs, to measure the expected ratio; None skips the measurement.
    """
    video = generate(program, request)
    latents, frames = video.latents, video.frames
    reached = None if exported is None else snr_db(latents[-1], generate(exported, request).latents[-1])
    content = np.ascontiguousarray(latents, '<f4').tobytes()
    return {
        'prompt': request.prompt,
        'seed': request.seed,
        'prompt_tables': {
            **{
                name: draft.table(f'vectors.video.{name}', np.asarray(getattr(video.prompt, name))[index])
                for name, index in (('text', 0), ('mask', 0), ('pooled', slice(None)))
            },
            'first_frame': None
            if video.first_frame is None
            else draft.table('vectors.video.first_frame', np.asarray(video.first_frame)[0, 0]),
        },
        'image': None if request.image is None else draft.table('vectors.video.image', request.image),
        'latents': {'file': draft.write(content, 'vectors/video.latents.bin'), 'shape': list(latents.shape)},
        'frames': {'file': draft.write(frames.tobytes(), 'vectors/video.frames.bin'), 'shape': list(frames.shape)},
        'cpu_db': reached and round(reached, 2),
        'minimum_db': reached and round(min(reached - MARGIN_DB, VIDEO_TARGET_DB), 2),
    }


class Generated(NamedTuple):
    """A video and its conditions.

    Attributes:
      prompt: encoded prompt of one example.
      first_frame: normalized latent [1, 1, h, w, C] of a first frame; None if the denoiser generated it.
      latents: normalized, [T, h, w, C].
      frames: bytes [F, H, W, 3].
    """

    prompt: Prompt
    first_frame: Any
    latents: np.ndarray
    frames: np.ndarray


def generate(program: Program, request: Request) -> Generated:
    """Generate a video with portable noise."""
    prompt, seed = request.prompt + request.modifier, request.seed
    plan, components = program.plan, program.components
    noise, first = PortableNoise([seed], plan.schedule), None
    guided = plan.guidance is not None or plan.first_guidance is not None
    encoded = components.encode_prompt([prompt])
    unwanted = components.encode_prompt([request.negative]) if guided else None
    picture = None if request.image is None else request.image[None, None]
    if picture is None and program.draw is not None:
        size = (plan.height * pipeline.SPATIAL_FACTOR, plan.width * pipeline.SPATIAL_FACTOR)
        picture = first_frame.to_frames(program.draw([prompt], PortablePictureNoise([seed])), *size)
    if picture is not None:
        first = pipeline.encode_first_frame(components, jnp.asarray(picture), noise)
    latents = sample(components.denoise, plan, encoded, noise, unwanted, first)
    frames = pipeline.decode(components, latents)
    return Generated(encoded, first, np.asarray(jax.device_get(latents))[0], frames[0])
