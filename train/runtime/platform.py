"""Settings that depend on the platform."""

from __future__ import annotations

import jax

AUTO = 'auto'
# Meaning of AUTO on TPUs, and on other platforms, where the kernel of `splash` would run interpreted.
ON_TPU, ELSEWHERE = 'splash', 'masked'


def attention_on_platform(setting: str) -> str:
    """Return the attention strategy of a setting; AUTO depends on the platform of the first device."""
    if setting != AUTO:
        return setting
    return ON_TPU if jax.default_backend() == 'tpu' else ELSEWHERE
