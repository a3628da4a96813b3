"""Using a trained run: scoring and measuring rows, packaging the model, publishing vectors."""
