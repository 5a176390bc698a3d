"""Proposes the table of a candidate's sites, from one run beside the oracle."""
