"""Finds the residual blocks of a model and fuses them: tracing, matching, plans, swapping."""
