"""The engine behind `pytest -m parity`: references, the oracle, gates and the report."""
