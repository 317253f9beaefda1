"""Drawn worlds with exact answers: avatars, heads, letters in fonts."""
