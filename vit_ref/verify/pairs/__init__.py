"""Any two implementations: a reference that a person declared, and a candidate that is judged by it."""
