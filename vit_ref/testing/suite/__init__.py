"""The parity suite: `pytest --pyargs vit_ref.testing.suite -m parity --candidate my_port.py`."""
