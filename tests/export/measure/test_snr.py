"""The signal-to-noise ratio."""

from __future__ import annotations

import numpy as np
import pytest

from export.measure.snr import snr_db


def test_snr():
    reference = np.array([3.0, 4.0])
    assert snr_db(reference, 1.1 * reference) == pytest.approx(20)
    assert snr_db(reference, reference) == 300
    assert snr_db(reference, np.array([np.nan, 4.0])) == -300
