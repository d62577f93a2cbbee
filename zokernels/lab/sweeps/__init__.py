"""Grids of runs: read from one file, done by several processes, put into one table."""
