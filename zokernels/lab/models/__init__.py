"""Models: how they are loaded, from what, and what of them is trained."""
