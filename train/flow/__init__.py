"""Pyramidal flow matching: examples, losses and guidance scales."""
