"""Comparison of any two implementations: a declared reference and a candidate."""
