"""Running what ``fuse_`` planned: whether all is as it was, and what is derived from weights."""
