"""Options of the text-encoder distillation."""

from __future__ import annotations

import dataclasses

from neodragon_jax.base.errors import InputError
from train.data import DTYPES
from train.runtime.optimizer import OptimizerConfig
from train.runtime.settings import check_range
from train.text.lora import LoraConfig
from train.text.parts import ADAPTERS

ENCODERS = ('frozen', 'lora', 'trained')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderLoraConfig(LoraConfig):
    """Low-rank updates of DT5."""

    rank: int = 16
    layers: str = '(query|key|value|out|mlp_gate|mlp_value|mlp_out|projection_in|projection_out)'


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Options of the objective.

    Attributes:
      adapter: 'replace' (the deployed one), 'extend' or 'none', see parts.py.
      encoder: training of DT5: 'frozen', 'trained' or 'lora'.
      hidden: widths of the adapter's hidden layers, each concatenated with the input.
      mse_weight: weight of the squared error of the embeddings.
      cosine_weight: weight of their cosine distance.
      held_out: V, prompts at the end of the data for the retrieval evaluation.
      held_out_batch: held-out prompts at a time; divides V.
      dtype: compute type, and storage type of T5-XXL; trained parameters stay float32.
    """

    adapter: str = 'replace'
    encoder: str = 'frozen'
    hidden: tuple[int, ...] = (4096, 4096, 4096, 4096)
    mse_weight: float = 1.0
    cosine_weight: float = 0.1
    held_out: int = 1000
    held_out_batch: int = 200
    dtype: str = 'bfloat16'
    lora: EncoderLoraConfig = dataclasses.field(default_factory=EncoderLoraConfig)
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4, warmup_steps=1000)
    )

    def __post_init__(self) -> None:
        choices = {'adapter': ADAPTERS, 'encoder': ENCODERS, 'dtype': DTYPES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f'{name} is {getattr(self, name)!r}; use one of {", ".join(known)}.')
        check_range(self, 'hidden', least=1)
        check_range(self, 'mse_weight', 'cosine_weight', least=0)
        if (self.adapter, self.encoder) == ('none', 'frozen'):
            raise InputError('adapter none with a frozen encoder leaves nothing to train; choose another of either.')
        if self.held_out < 0 or self.held_out_batch < 1 or self.held_out % self.held_out_batch:
            raise InputError(
                f'held_out is {self.held_out} and held_out_batch {self.held_out_batch}; hold out a multiple of the '
                'batch, or 0.'
            )
