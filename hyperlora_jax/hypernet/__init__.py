"""Condition to LoRA: networks, generators, closed forms, editing, familiarity."""
