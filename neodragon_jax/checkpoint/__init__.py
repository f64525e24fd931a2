"""Checkpoints: `load` and `save` folders of the released layout, `save_native` and `restore_native` those of Orbax.

import neodragon_jax.checkpoint as checkpoint

module, params = checkpoint.load('CHECKPOINT/context_adapter')
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neodragon_jax.checkpoint.components import load, save
    from neodragon_jax.checkpoint.native import restore_native, save_native

__all__ = ['load', 'restore_native', 'save', 'save_native']


def __getattr__(name: str) -> Any:
    """Import a function when it is first used: JAX and Orbax take seconds, and commands should answer at once."""
    if name in ('load', 'save'):
        from neodragon_jax.checkpoint import components

        return getattr(components, name)
    if name in ('restore_native', 'save_native'):
        from neodragon_jax.checkpoint import native

        return getattr(native, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
