"""Fixtures of the teacher's tests."""

from support.teacher_runs import data  # noqa: F401
