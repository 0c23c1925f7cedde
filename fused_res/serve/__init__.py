"""``optimize_for_inference``: a copy of a model for serving."""
