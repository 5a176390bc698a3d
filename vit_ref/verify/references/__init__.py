"""The references, which decide, and the NumPy oracle, which must agree with them."""
