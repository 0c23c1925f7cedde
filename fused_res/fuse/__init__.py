"""Finding residual blocks in a model and changing them: tracing, matching, plans, swapping."""
