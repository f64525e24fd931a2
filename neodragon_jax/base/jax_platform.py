"""The platform that JAX is told to use, in the environment variable JAX_PLATFORMS."""

from __future__ import annotations

import os
import sys

_VARIABLE = 'JAX_PLATFORMS'


def no_platform() -> str:
    """Return one line on why JAX cannot use the platform that it is told to use; '' if it can, or was not asked yet.

    JAX looks for devices when they are first needed, deep inside a command, and fails with errors of several kinds.
    """
    chosen, jax = os.environ.get(_VARIABLE), sys.modules.get('jax')
    if not chosen or jax is None:
        return ''
    try:
        jax.devices()
    except Exception as error:
        reason = str(error).partition(' (set JAX_PLATFORMS')[0].rstrip('. ') or 'it has no device'
        return (
            f'JAX cannot use the platform of {_VARIABLE}={chosen}: {reason}. Install its plugin, such as jax[tpu] or '
            f'jax[cuda12], or unset {_VARIABLE}, so that JAX chooses.'
        )
    return ''
