"""Benchmarks: times forward pass and training step beside other implementations, against a measured roofline."""
