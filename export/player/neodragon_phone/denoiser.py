"""Noise to latents: unit by unit, stage by stage, step by step.

Legend: T latent frames (= units), h w latent grid, C channels.
Source: arXiv 2410.05954, algorithm 1; arXiv 2511.06055, section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neodragon_phone import noise
from neodragon_phone.bundle import Bundle
from neodragon_phone.player import Player, Sessions
from neodragon_phone.pyramid import color_noise, down, patchify, unpatchify, up
from neodragon_phone.text import Prompt

# Modulation vectors of each prompt and timestep, the latter by the name of its sinusoid.
Modulation = Mapping[tuple[int, str], Mapping[str, np.ndarray]]


def generate_latents(
    player: Player, prompts: Sequence[Prompt], seed: int, first_frame: np.ndarray | None
) -> np.ndarray:
    """Return the normalized latents of a video, [T, h, w, C].

    Args:
      prompts: the prompt, and for guidance the negative prompt.
      first_frame: normalized latent [h, w, C] of a given first frame.
    """
    modulation = _modulate(player, prompts)
    with player.phase('denoising') as graphs:
        return _Generation(player, graphs, prompts, modulation, seed).run(first_frame)


def _modulate(player: Player, prompts: Sequence[Prompt]) -> Modulation:
    """Return the modulation vectors of all prompts and timesteps: all units share them."""
    stages = player.manifest['denoiser']['stages']
    tables = {step['sinusoid'] for stage in stages for kind in _STEPS for step in stage[kind]}
    with player.phase('modulation') as graphs:
        run = graphs['denoiser_modulation']
        return {
            (number, table): run({'timestep': player.bundle.table(table), 'pooled': prompt.pooled})
            for number, prompt in enumerate(prompts)
            for table in sorted(tables)
        }


_STEPS = ('first_unit_steps', 'steps')


@dataclasses.dataclass(frozen=True)
class _Generation:
    """One video."""

    player: Player
    graphs: Sessions
    prompts: Sequence[Prompt]
    modulation: Modulation
    seed: int

    @property
    def _denoiser(self) -> Any:
        return self.player.manifest['denoiser']

    def run(self, first_frame: np.ndarray | None) -> np.ndarray:
        """Return the latents [T, h, w, C]."""
        video, stages = self.player.manifest['video'], self._denoiser['stages']
        shape = tuple(video[f'latent_{side}'] for side in ('height', 'width', 'channels'))
        latents = np.zeros((video['latent_frames'], *shape), np.float32)
        if first_frame is not None:
            latents[0] = first_frame
        for unit in range(0 if first_frame is None else 1, len(latents)):
            coarser = range(len(stages) - 1, -1, -1)
            pyramid = [down(latents, times) for times in coarser]
            white = noise.normals(self.seed, noise.INITIAL, unit, 0, shape)
            x = down(white, len(stages) - 1) * np.float32(2 ** (len(stages) - 1))
            for number, stage in enumerate(stages):
                if number > 0:
                    x = self._enter(x, number, stage, unit)
                x = self._denoise(x, stage, unit, pyramid)
                self.player.report(f'  unit {unit} of {len(latents) - 1}, stage {number}')
            latents[unit] = x
        return latents

    def _enter(self, x: np.ndarray, number: int, stage: Any, unit: int) -> np.ndarray:
        """Carry a finished stage into the next one."""
        larger = up(x)
        white = noise.normals(self.seed, noise.BLOCK, unit, number, larger.shape)
        enter = stage['enter']
        return np.float32(enter['alpha']) * larger + np.float32(enter['beta']) * color_noise(
            white, self._denoiser['gamma']
        )

    def _denoise(self, x: np.ndarray, stage: Any, unit: int, pyramid: Sequence[np.ndarray]) -> np.ndarray:
        """Return x at the end of a stage."""
        patch, first = self._denoiser['patch'], unit == 0
        scale = self._denoiser['first_guidance' if first else 'guidance']
        history = []
        for entry in stage['history']:
            past, level = unit - entry['distance'], pyramid[entry['stage']]
            history.append(patchify(level[past] if past >= 0 else np.zeros_like(level[0]), patch))
        for step in stage['first_unit_steps' if first else 'steps']:
            patches = np.concatenate([*history, patchify(x, patch)])
            flow = self._flow(0, patches, stage, unit, step['sinusoid'])
            if scale is not None:
                away = self._flow(1, patches, stage, unit, step['sinusoid'])
                flow = away + np.float32(scale) * (flow - away)
            length = np.float32(step['next_level']) - np.float32(step['level'])
            x = x + length * unpatchify(flow, patch, *x.shape[:2])
        return x

    def _flow(self, number: int, patches: np.ndarray, stage: Any, unit: int, sinusoid: str) -> np.ndarray:
        """Return the flow of the current unit's patches for one of the prompts."""
        prompt = self.prompts[number]
        place = place_inputs(self.player.bundle, stage, unit, prompt.mask)
        feeds = {'patches': patches, 'text': prompt.text, **place, **self.modulation[number, sinusoid]}
        return self.graphs[stage['graph']](feeds)['flow']


def place_inputs(bundle: Bundle, stage: Any, unit: int, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Return rotary embedding and attention bias of a unit: from tables, with the padded rows where text is padding."""
    inputs = {}
    for name, entry in stage['units'][unit].items():
        array = bundle.table(entry['table'])
        if 'padded' in entry:
            array = np.array(array)
            rows = np.flatnonzero(mask == 0)
            array[:, rows] = bundle.table(entry['padded'])[:, rows]
        inputs[name] = np.asarray(array)
    return inputs
