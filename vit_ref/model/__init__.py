"""The model: configuration, layers and the names of its values. It imports nothing else of the package."""
