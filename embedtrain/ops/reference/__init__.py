"""Plain PyTorch implementations: the definition of every op."""
