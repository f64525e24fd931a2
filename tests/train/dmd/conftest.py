"""Fixtures of the step distillation's tests."""

from support.dmd_runs import samples  # noqa: F401
