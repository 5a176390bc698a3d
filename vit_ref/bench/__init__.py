"""How fast: forward pass and train step beside other implementations, in one process, against a measured roofline."""
