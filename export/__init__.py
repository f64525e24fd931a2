"""Phone export: JAX functions to ONNX, to W8A16 or FP16, to QNN context binaries. Run `python -m export --help`."""
