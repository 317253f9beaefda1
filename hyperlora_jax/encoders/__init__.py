"""Condition encoders behind one protocol: ours, CLIP, ONNX, transformers."""
