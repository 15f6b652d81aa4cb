"""How good predicted images and frames are, and how they look."""
