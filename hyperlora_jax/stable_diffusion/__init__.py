"""The base as people use it: model, sampling, loss, text conditions, parity."""
