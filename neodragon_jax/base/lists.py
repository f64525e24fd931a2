"""Comma-separated lists in command-line options."""

from __future__ import annotations

from collections.abc import Iterable

from neodragon_jax.base.errors import InputError, did_you_mean


def comma_list(text: str) -> list[str]:
    """Return the entries of a comma-separated list without surrounding spaces; empty entries are left out."""
    return [entry.strip() for entry in text.split(',') if entry.strip()]


def known_entries(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Return the entries of a comma-separated list, each once, in the order given.

    Args:
      option: the option's name, for error messages.
      known: accepted entries.
    Raises:
      InputError: an entry is unknown, or there is none.
    """
    entries, known = comma_list(text), list(known)
    for entry in entries:
        if entry not in known:
            raise InputError(
                f'{option} has {entry!r}.{did_you_mean(entry, known)} Use one or more of {", ".join(known)}.'
            )
    if not entries:
        raise InputError(f'{option} is empty; use one or more of {", ".join(known)}.')
    return list(dict.fromkeys(entries))
