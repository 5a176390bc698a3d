"""Explains a divergence: the known bugs, and which of them reproduce the candidate's values."""
