"""Proposes the table of a candidate's sites, by running it beside the oracle."""
