"""The cache on disk: compiled programs, and what references compute. Nothing in it depends on the candidate."""
