"""Measurements of the passes over the weights."""
