"""Retrieval: matrix factorisation and two towers."""
