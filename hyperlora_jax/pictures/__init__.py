"""Files to concepts; the only reader of pictures."""
