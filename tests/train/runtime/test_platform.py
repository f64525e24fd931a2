"""Settings by platform."""

from __future__ import annotations

import jax
import pytest

from train.runtime.platform import attention_on_platform


@pytest.mark.parametrize(('platform', 'strategy'), [('tpu', 'splash'), ('cpu', 'masked'), ('gpu', 'masked')])
def test_auto_attention_is_the_kernel_on_tpus_only(monkeypatch, platform, strategy):
    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    assert attention_on_platform('auto') == strategy
    for named in ('masked', 'prefix', 'splash'):
        assert attention_on_platform(named) == named
