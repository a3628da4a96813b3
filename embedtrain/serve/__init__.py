"""What is done with a trained run: rows are scored and measured, and the model is packed for other programs."""
