"""The signal-to-noise ratio."""

from __future__ import annotations

import numpy as np
import pytest

from export.measure.snr import snr_db


def test_snr():
    reference = np.array([3.0, 4.0])
    assert snr_db(reference, 1.1 * reference) == pytest.approx(20)
    assert snr_db(reference, reference) == 300
    for broken in (np.nan, np.inf):
        assert snr_db(reference, np.array([broken, 4.0])) == -300 and snr_db(np.array([broken, 4.0]), reference) == -300
