"""The phone bundle: one folder from which a video is played without JAX. See docs/bundle.md."""
