"""Which samples the step distillation takes: those whose text states come from its checkpoint's own adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from support.goldens import TINY_CHECKPOINT
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter
from train.dmd import program as dmd

CONFIG = dmd.DMDConfig(checkpoint=str(TINY_CHECKPOINT), protocol='21', dtype='float32', remat='none')
LATENTS, MASK, POOLED = (2, 8, 8, 16), np.ones(4, np.int32), np.zeros(48, np.float32)
# What train.latents writes with --text ids and --text t5, and what train.prompts writes.
CONTENTS = {
    'ids': {'latents': np.zeros(LATENTS, np.float32), 'ids': MASK, 'text_mask': MASK},
    't5': {'latents': np.zeros(LATENTS, np.float32), 't5': np.zeros((4, 64), np.float32), 'text_mask': MASK},
    'prompts': {'ids': MASK, 'text_mask': MASK},
}


def samples(folder: Any, sample: dict[str, np.ndarray], protocol: dict[str, Any]) -> SampleSource:
    specs = {name: ArraySpec(array.shape, str(array.dtype)) for name, array in sample.items()}
    with SampleWriter(folder, RecordSpec(specs), 2, protocol=protocol) as writer:
        for index in writer.missing():
            writer.append(sample | {'index': index, 'prompt': 'a kite'})
    return SampleSource(folder)


@pytest.mark.parametrize('content', CONTENTS)
@pytest.mark.parametrize('protocol', [{}, {'adapter': None}])
def test_samples_without_an_adapter_are_refused_in_one_line(tmp_path, content, protocol):
    source = samples(tmp_path / 'samples', CONTENTS[content], {'content': content} | protocol)
    with pytest.raises(InputError, match=r'come from no context adapter.*train\.teacher_samples') as error:
        dmd.load_program(CONFIG, source)
    assert '\n' not in str(error.value)
