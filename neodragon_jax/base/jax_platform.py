"""The platform that JAX is told to use, in the environment variable JAX_PLATFORMS."""

from __future__ import annotations

import os
import traceback

_VARIABLE = 'JAX_PLATFORMS'
# Module of JAX that looks for devices.
_LOOKS = 'jax._src.xla_bridge'


def no_platform(error: Exception) -> str:
    """Return one line for an error because JAX cannot use the platform that it is told to use; '' for another error.

    JAX looks for devices when they are first needed, deep inside a command, and fails with errors of several kinds.
    They are known by where they come from: to ask JAX again could wait for the other hosts of a pod.
    """
    chosen = os.environ.get(_VARIABLE)
    frames = traceback.walk_tb(error.__traceback__)
    if not chosen or not any(frame.f_globals.get('__name__') == _LOOKS for frame, _ in frames):
        return ''
    reason = str(error).partition(' (set JAX_PLATFORMS')[0].rstrip('. ') or 'it has no device'
    return (
        f'JAX cannot use the platform of {_VARIABLE}={chosen}: {reason}. Install its plugin, such as jax[tpu] or '
        f'jax[cuda12], or unset {_VARIABLE}, so that JAX chooses.'
    )
