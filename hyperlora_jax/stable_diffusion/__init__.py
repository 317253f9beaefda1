"""The base as people use it: model, sampling, loss, prompt embeddings, parity."""
