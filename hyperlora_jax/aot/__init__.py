"""Training steps compiled for pods without a pod."""
