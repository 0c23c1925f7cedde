"""Which implementation runs, and why: backends, rules, tables of timings."""
