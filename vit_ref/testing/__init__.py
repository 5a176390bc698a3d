"""For pytest: the plugin, the parity suite, and checks as test cases of your own."""
