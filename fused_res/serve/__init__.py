"""``optimize_for_inference``: a model made to serve."""
