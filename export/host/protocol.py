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

# Increases when the layout of the files changes.
FORMAT = 6
FORMAT_KEY, MADE_BY = 'format', 'code and tools'
KEPT, VALIDATION, VIDEOS = 'calls kept per video', 'validation prompts', 'videos'


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Inputs and settings that a calibration set is recorded from.

    Attributes:
      components: fingerprint of every component and tokenizer, by name.
      scenes: calibration prompts, images and seed.
      validation: held-out prompts that settings are chosen on; one video each.
      evaluation: held-out prompts that ratios are reported on; one video each.
      plan: latent size, steps and guidance.
      keep: number of calls of each graph kept per calibration video.
      videos: number of calibration videos.
      made_by: code, versions of packages, and settings of JAX that the recording depends on.
    """

    components: Mapping[str, str]
    scenes: Scenes
    validation: Scenes
    evaluation: Scenes
    plan: Plan
    keep: Mapping[str, int]
    videos: int
    made_by: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """SHA-256 of the protocol."""
        return _sha256(self.to_json())

    def video_sha256(self, validates: bool) -> str:
        """Return the SHA-256 of what one video depends on.

        Args:
          validates: whether it is a validation video; only these depend on the validation prompts.
        """
        left_out = {VIDEOS} if validates else {VIDEOS, VALIDATION}
        return _sha256({key: value for key, value in self.to_json().items() if key not in left_out})

    def takes_no_more_calls_than(self, found: Mapping[str, Any]) -> bool:
        """Return whether the calibration videos of a stored protocol have at least as many calls of each graph."""
        videos, kept = found[VIDEOS], found[KEPT]
        if not isinstance(videos, int) or not isinstance(kept, dict):
            return False
        calls = {name: count * videos for name, count in kept.items()}
        return all(count * self.videos <= calls.get(name, -1) for name, count in self.keep.items())

    def to_json(self) -> dict[str, Any]:
        """Return the protocol as a flat table of JSON values."""
        images = hashlib.sha256(b''.join(np.ascontiguousarray(image).tobytes() for image in self.scenes.images))
        return {
            FORMAT_KEY: FORMAT,
            MADE_BY: as_json(dict(self.made_by)),
            **{f'files of {name}': digest for name, digest in self.components.items()},
            'prompts': list(self.scenes.prompts),
            VALIDATION: list(self.validation.prompts),
            'evaluation prompts': list(self.evaluation.prompts),
            'modifier': self.scenes.modifier,
            'negative prompt': self.scenes.negative_prompt,
            'images': images.hexdigest() if self.scenes.images else None,
            'seed': self.scenes.seed,
            'portable noise of evaluation': self.evaluation.portable,
            'plan': as_json(dataclasses.asdict(self.plan)),
            KEPT: dict(self.keep),
            VIDEOS: self.videos,
        }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the keys in which two protocols differ; if their formats differ, only that, as it decides the others."""
    different = sorted(key for key in {**wanted, **found} if found.get(key) != wanted.get(key))
    return [FORMAT_KEY] if FORMAT_KEY in different else different


def _sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
