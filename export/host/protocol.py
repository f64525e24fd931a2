"""The protocol of a calibration set: everything that determines its content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from export.host.recording import Scenes
from neodragon_jax.base.json_file import as_json
from neodragon_jax.pyramid.sampler import Plan

# Increases when the layout of the files or the noise of a video changes.
FORMAT = 5
KEPT, VALIDATION, VIDEOS = 'calls kept per video', 'validation prompts', 'videos'


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Inputs and settings that a calibration set is recorded from.

    Attributes:
      components: fingerprint of every component, by name.
      scenes: calibration prompts, images and seed.
      validation: held-out prompts that settings are chosen on; one video each.
      evaluation: held-out prompts that ratios are reported on; one video each.
      plan: latent size, steps and guidance.
      keep: number of calls of each graph kept per calibration video.
      videos: number of calibration videos.
    """

    components: Mapping[str, str]
    scenes: Scenes
    validation: Scenes
    evaluation: Scenes
    plan: Plan
    keep: Mapping[str, int]
    videos: int

    @property
    def sha256(self) -> str:
        """SHA-256 of the protocol."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the protocol as a flat table of JSON values."""
        images = hashlib.sha256(b''.join(np.ascontiguousarray(image).tobytes() for image in self.scenes.images))
        return {
            'format': FORMAT,
            **{f'weights of {name}': digest for name, digest in self.components.items()},
            'prompts': list(self.scenes.prompts),
            VALIDATION: list(self.validation.prompts),
            'evaluation prompts': list(self.evaluation.prompts),
            'modifier': self.scenes.modifier,
            'negative prompt': self.scenes.negative_prompt,
            'images': images.hexdigest() if self.scenes.images else None,
            'seed': self.scenes.seed,
            'plan': as_json(dataclasses.asdict(self.plan)),
            KEPT: dict(self.keep),
            VIDEOS: self.videos,
        }
