"""A plan made real: surgery, checkpoints, ONNX export and the parity that proves them equal."""
