"""Play a Neodragon phone bundle: prompt to video with ONNX Runtime, without JAX."""
