"""Small ONNX graph passes, one idea per file, on onnx-ir models."""
