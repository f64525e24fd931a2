"""Peak rates of accelerators: FLOP/s of bfloat16 matrix products per device.

Sources: Google's Cloud TPU documentation (system architecture of each generation), and NVIDIA's data sheets (dense).
"""

from __future__ import annotations

PEAK_FLOPS = {
    'v4': 275e12,
    'v5e': 197e12,
    'v5p': 459e12,
    'v6e': 918e12,
    'tpu7x': 1153.5e12,  # of one core, which is a device
    'A100': 312e12,
    'H100': 989e12,
    'H200': 989e12,
    'B200': 2250e12,
}
# Substrings of `jax.Device.device_kind`; the first match decides.
_KINDS = (
    ('TPU v4', 'v4'),
    ('TPU v5 lite', 'v5e'),
    ('TPU v5e', 'v5e'),
    ('TPU v5', 'v5p'),
    ('TPU v6', 'v6e'),
    ('TPU7', 'tpu7x'),
    ('A100', 'A100'),
    ('H100', 'H100'),
    ('H200', 'H200'),
    ('B200', 'B200'),
)


def peak_flops(device_kind: str) -> float | None:
    """Return the peak rate of a device by its kind, or None for an unknown one, such as a CPU."""
    return next((PEAK_FLOPS[name] for part, name in _KINDS if part in device_kind), None)
