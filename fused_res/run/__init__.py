"""Runs plans, guards them against changes of the module, and caches packed weights."""
