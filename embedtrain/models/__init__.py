"""Trainable models: embeddings, scorer and loss, one model a file."""
