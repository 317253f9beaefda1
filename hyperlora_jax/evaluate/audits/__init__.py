"""What scores do not show: copies, weights, confidence, learning curves."""
