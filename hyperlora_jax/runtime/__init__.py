"""What leaves JAX: programs and files that PyTorch and ONNX Runtime run."""
