"""Every method on the same held-out identities, captions and noise."""
