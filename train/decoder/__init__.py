"""Distillation of the small decoder of a video VAE."""
