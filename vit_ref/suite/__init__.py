"""The parity suite for whoever has no checkout: `pytest --pyargs vit_ref.suite -m parity --candidate my_port.py`.

The wheel puts the tests of `tests/parity` here (see `pyproject.toml`); a checkout runs them where they are.
"""
