"""Trained vectors for other programs and for a look: from a checkpoint, streamed, without a model."""

from __future__ import annotations

from embedtrain.export.formats import FORMATS, export_vectors
from embedtrain.export.neighbors import neighbors
from embedtrain.export.vectors import Vectors, open_vectors, unit_rows

__all__ = ["FORMATS", "Vectors", "export_vectors", "neighbors", "open_vectors", "unit_rows"]
