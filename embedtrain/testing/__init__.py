"""Helpers that run a function on several ranks; imported only by tests."""
