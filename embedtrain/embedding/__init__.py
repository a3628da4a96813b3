"""Sharded tables and the exchange of their rows."""
