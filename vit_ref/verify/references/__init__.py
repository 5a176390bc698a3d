"""The references, which decide, and the NumPy oracle, which has to agree with them."""
