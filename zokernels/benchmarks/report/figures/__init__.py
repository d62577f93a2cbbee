"""Figures: a file each."""
