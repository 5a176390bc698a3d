"""Ports that are not ours: declared by the person in a few lines, and observed from outside."""
