"""Published steps: the models have the published sizes, and unknown names are refused."""

from __future__ import annotations

import math

import pytest

from train.measure import published_steps


@pytest.mark.parametrize(('name', 'billions'), [('16b', 16), ('32b', 32)])
def test_models_have_their_published_size(name, billions):
    model = published_steps.MODELS[name]
    count = sum(math.prod(shape) for shape in published_steps.shapes(model).values())
    assert count / 1e9 == pytest.approx(billions, rel=0.03)
    # Six FLOPs per parameter and token, and the attention on top; the embedding is a lookup.
    per_token = model.flops() / (model.batch * published_steps.TOKENS)
    assert 1.0 < per_token / (6 * count) < 1.1


def test_unknown_models_are_refused(capsys):
    assert published_steps.main(['--models', '16c']) == 2
    assert '--models 16c: no such model' in capsys.readouterr().err
