"""A run: its settings, what is done by them in which order, and what it leaves in its folder."""
