"""Base models, fine-tuned UNets, the encoder and the attribute probe."""
