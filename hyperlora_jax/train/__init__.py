"""The training loop and what it needs; read loop.py first."""
