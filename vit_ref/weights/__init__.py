"""Weights: turns files of every layout into parameters of the model, and back."""
