"""Sizes of QuickSRNet, the super-resolution network: three published variants, each for three scaling factors.

Field names are the arguments of the published models.
Source: QuickSRNet, arXiv 2303.04336, and its published model cards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field

from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.config.component import ComponentConfig, Width


@dataclasses.dataclass(frozen=True)
class SuperResolutionConfig(ComponentConfig):
    """QuickSRNet. The defaults are the medium variant for twice the size.

    Attributes:
      scaling_factor: 2, 3 or 4. The published 1.5 is another architecture, with a space-to-depth before its end.
      num_channels: width of the hidden convolutions.
      num_intermediate_layers: hidden convolutions after the first.
      use_ito_connection: whether a 1x1 convolution of the input is added to the output, which then is a residual.
    """

    scaling_factor: Literal[2, 3, 4] = 2
    num_channels: Width = 32
    num_intermediate_layers: Annotated[int, Field(ge=0, le=256)] = 5
    use_ito_connection: bool = False
    in_channels: Width = 3
    out_channels: Width = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_channels != self.out_channels:
            raise InputError(
                f'SuperResolutionConfig: {self.in_channels} input and {self.out_channels} output channels; '
                'give as many, because the output begins as the enlarged input.'
            )
        if self.num_channels < self.in_channels:
            raise InputError(
                f'SuperResolutionConfig.num_channels is {self.num_channels}; at least the {self.in_channels} channels '
                'of the input must pass.'
            )


VARIANTS: Mapping[str, SuperResolutionConfig] = MappingProxyType(
    {
        'small': SuperResolutionConfig(num_channels=32, num_intermediate_layers=2),
        'medium': SuperResolutionConfig(num_channels=32, num_intermediate_layers=5),
        'large': SuperResolutionConfig(num_channels=64, num_intermediate_layers=11, use_ito_connection=True),
    }
)


def variant(name: str, scaling_factor: int = 2) -> SuperResolutionConfig:
    """Return the sizes of a published variant.

    Raises:
      InputError: the variant does not exist, or does not support this factor.
    """
    if name not in VARIANTS:
        raise InputError(
            f'QuickSRNet variant {name!r}: no such one.{did_you_mean(name, VARIANTS)} Use one of {", ".join(VARIANTS)}.'
        )
    return dataclasses.replace(VARIANTS[name], scaling_factor=scaling_factor)
