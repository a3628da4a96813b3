"""Sharded embedding tables, and the exchange of ids, vectors and gradients between ranks."""
