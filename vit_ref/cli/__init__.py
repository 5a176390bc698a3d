"""The command line, one file a command. These files import jax and flax only when a command runs."""
