"""Tables of the first-frame model's host part: two text towers, the UNet's embedding, and the four steps.

Legend: P pooled width, E embedding width, S steps.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from export.bundle.contents import Draft
from export.bundle.host_tables import clip_entry
from export.graphs import pictures
from export.graphs.stored_params import read_float32
from export.host.graph_program import FirstFrameHost
from export.host.modules import ProgramOptions
from neodragon_jax.checkpoint import folders
from neodragon_jax.generation import consistency_sampler
from neodragon_jax.models.layers import timestep_sinusoid
from neodragon_jax.models.modulation import ConditioningMLP
from neodragon_jax.models.sdxl_unet import UNet2DConditionModel


def first_frame_entry(draft: Draft, options: ProgramOptions) -> dict[str, Any]:
    """Write the tables of the first-frame model; return its part of the manifest."""
    host = FirstFrameHost.load(options)
    names = ('first_frame_clip_l', 'first_frame_clip_g')
    towers = zip(names, host.tokenizers, host.towers, strict=True)
    height, width = host.size
    return {
        'towers': {name: clip_entry(draft, name, tokenizer.backend, tower) for name, tokenizer, tower in towers},
        'height': height,
        'width': width,
        'latent_height': host.latent_size[0],
        'latent_width': host.latent_size[1],
        'latent_channels': host.latent_size[2],
        'scaling_factor': host.scaling_factor,
        'embedding': _embedding_tables(draft, options, host),
        'steps': [_step_entry(number) for number in range(len(consistency_sampler.TIMESTEPS))],
    }


def _embedding_tables(draft: Draft, options: ProgramOptions, host: FirstFrameHost) -> dict[str, str]:
    """Write the tables of embedding = silu(step[s] + output_kernel^T silu(hidden_kernel^T pooled + hidden_bias)).

    Timesteps and picture size are fixed, so their contributions are precomputed in `step` [S, E] and `hidden_bias` [E].
    """
    folder = options.find(folders.FIRST_FRAME_UNET)
    unet = pictures.open_component(folder, UNet2DConditionModel)
    params = read_float32(folder, *pictures.UNET_HOST)
    mlp = ConditioningMLP(unet.config.embedding_width)
    sinusoids = timestep_sinusoid(
        jnp.asarray(consistency_sampler.TIMESTEPS, jnp.float32), unet.config.block_out_channels[0]
    )
    added = params['add_embedding']
    steps = np.asarray(mlp.apply({'params': params['time_embedding']}, sinusoids)) + added['linear_2']['bias']
    height, width = host.size
    sizes = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
    size = np.asarray(timestep_sinusoid(sizes, unet.config.addition_time_embed_dim)).reshape(-1)
    kernel = added['linear_1']['kernel']
    pooled = len(kernel) - len(size)
    return {
        'step': draft.table('first_frame.embedding.step', steps),
        'hidden_kernel': draft.table('first_frame.embedding.hidden_kernel', kernel[:pooled]),
        'hidden_bias': draft.table(
            'first_frame.embedding.hidden_bias', added['linear_1']['bias'] + size @ kernel[pooled:]
        ),
        'output_kernel': draft.table('first_frame.embedding.output_kernel', added['linear_2']['kernel']),
    }


def _step_entry(number: int) -> dict[str, Any]:
    """Return the coefficients of one step: clean = (x - noise e) / signal; x = take clean + keep x, then add noise."""
    timestep = consistency_sampler.TIMESTEPS[number]
    signal, noise = consistency_sampler.signal_and_noise(timestep)
    keep, take = consistency_sampler.boundary_weights(timestep)
    entry: dict[str, Any] = {'timestep': timestep, 'signal': signal, 'noise': noise, 'keep': keep, 'take': take}
    if number + 1 == len(consistency_sampler.TIMESTEPS):
        return entry | {'next': None}
    signal, noise = consistency_sampler.signal_and_noise(consistency_sampler.TIMESTEPS[number + 1])
    return entry | {'next': {'signal': signal, 'noise': noise}}
