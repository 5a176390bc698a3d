"""Weights: files become parameters of the model and back, in every layout."""
