"""Decides which implementation runs: backends, rules, tables of timings."""
