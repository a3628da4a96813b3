"""Exporting and querying trained vectors: streamed from a checkpoint, without building the model."""

from __future__ import annotations

from embedtrain.export.formats import export_vectors
from embedtrain.export.neighbors import neighbors
from embedtrain.export.vectors import Vectors, open_vectors, unit_rows

__all__ = ["Vectors", "export_vectors", "neighbors", "open_vectors", "unit_rows"]
