"""Concepts to encoded subjects, kept in files that hosts share."""
