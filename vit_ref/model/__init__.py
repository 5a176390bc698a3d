"""The model: configuration, layers and the names of its values. It knows nothing of the rest of the package."""
