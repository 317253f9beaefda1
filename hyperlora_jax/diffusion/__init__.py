"""Schedules, conversions, samplers: pure maths, shared by pictures and weights."""
