"""Pyramidal flow matching: its examples, its evaluation, and the denoisers it trains."""
