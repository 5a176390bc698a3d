"""The known bugs, and which of them explain a divergence."""
