"""UNet, autoencoder, CLIP, their layers and kernels, and strict configs."""
