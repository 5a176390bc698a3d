"""Candidates of other people: a declaration of a few lines, and what observes them from outside."""
