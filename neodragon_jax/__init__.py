"""Neodragon, text to video, in JAX: `load` a checkpoint, then `generate`. See neodragon_jax.api."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neodragon_jax.api import Progress, System, Video, VideoOptions, load
    from neodragon_jax.base.errors import InputError

# Read by setup.cfg, without importing anything.
__version__ = '0.1.0'

__all__ = ['InputError', 'Progress', 'System', 'Video', 'VideoOptions', 'load']


def __getattr__(name: str) -> Any:
    """Import the interface when it is first used: JAX takes seconds, and commands should answer at once."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if name == 'InputError':
        from neodragon_jax.base.errors import InputError

        return InputError
    from neodragon_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
