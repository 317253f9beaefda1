"""A local page: a picture in, a LoRA and pictures out; what arrives together is drawn together."""
