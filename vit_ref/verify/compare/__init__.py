"""The engine: two implementations are run on the same inputs and compared at every site."""
