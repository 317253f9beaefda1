"""Who marks: encoders, the attribute probe, LPIPS."""
