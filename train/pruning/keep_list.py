"""Keep lists of a denoiser's blocks, and the pruned denoiser.

A keep list has the indices of blocks in the full denoiser, in ascending order: 0,1,2,4. It must include the last block,
which ends the text stream and has different parameters, so that no other block can replace it.

Source: Neodragon, arXiv 2511.06055, section on block pruning (24 -> 18 blocks).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import checked, read_json
from neodragon_jax.base.paths import user_path
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.models.teacher import TeacherMMDiT

Denoiser = PyramidMMDiT | TeacherMMDiT

# Key in the file that `train.prune select` writes.
KEEP = 'keep'


def read_keep(text: str) -> tuple[int, ...]:
    """Return a keep list given as '0,1,2,4' or as a JSON file with the key "keep".

    Raises:
      InputError: the text is neither.
    """
    remedy = 'give numbers of blocks such as 0,1,2,4, or the keep.json of train.prune select.'
    try:
        if text.lower().endswith('.json'):
            path = user_path(text, 'keep list')
            blocks = checked(read_json(path, dict[str, Any]).get(KEEP), list[int], str(path), KEEP)
        else:
            blocks = [int(word) for word in text.split(',')]
    except ValueError as error:  # including InputError
        raise InputError(f'keep list {text!r}: {error}; {remedy}') from None
    return tuple(blocks)


def check_keep(keep: Sequence[int], blocks: int) -> None:
    """Raise InputError unless a keep list is valid for a denoiser with that many blocks."""
    given = f'keep list {",".join(map(str, keep))}'
    if not keep:
        raise InputError('keep list is empty; keep at least the last block.')
    if list(keep) != sorted(set(keep)):
        raise InputError(f'{given}: give every block once, in the order of the denoiser.')
    if keep[0] < 0 or keep[-1] >= blocks:
        raise InputError(f'{given}: the denoiser has blocks 0..{blocks - 1}.')
    if keep[-1] != blocks - 1:
        raise InputError(f'{given}: the last block, {blocks - 1}, ends the text stream and cannot be removed; add it.')


def prune(module: Denoiser, params: dict[str, Any], keep: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    """Return the denoiser with only the kept blocks, and its parameters, in the form of `params`.

    Args:
      params: unrolled or stacked for the scan; host or device arrays.
    Raises:
      InputError: the keep list is invalid for the denoiser.
    """
    blocks = module.config.num_layers
    check_keep(keep, blocks)
    smaller = module.clone(config=dataclasses.replace(module.config, num_layers=len(keep)))
    if isinstance(module, TeacherMMDiT):
        return smaller, {**params, 'denoiser': _pruned(params['denoiser'], keep, blocks)}
    return smaller, _pruned(params, keep, blocks)


def _pruned(params: dict[str, Any], keep: Sequence[int], blocks: int) -> dict[str, Any]:
    """Return the parameters of a PyramidMMDiT with only the kept blocks."""
    pruned, repeated = dict(params), list(keep[:-1])
    for name in ('blocks', 'modulators') if blocks > 1 else ():
        if name in pruned:
            stacked = pruned.pop(name)
            if repeated:
                pruned[name] = jax.tree.map(lambda leaf: leaf[np.asarray(repeated)], stacked)
        else:
            trees = [pruned.pop(f'{name}_{block}') for block in range(blocks - 1)]
            pruned |= {f'{name}_{place}': trees[block] for place, block in enumerate(repeated)}
    return pruned
