"""Measures of model quality, and the sinks that write them."""

from __future__ import annotations

from embedtrain.metrics.analogies import AnalogyReport, AnalogySection, evaluate_analogies
from embedtrain.metrics.sinks import ConsoleSink, JsonlSink, MetricSink, TensorBoardSink
from embedtrain.metrics.word_similarity import SimilarityReport, evaluate_similarity

__all__ = [
    "AnalogyReport",
    "AnalogySection",
    "ConsoleSink",
    "JsonlSink",
    "MetricSink",
    "SimilarityReport",
    "TensorBoardSink",
    "evaluate_analogies",
    "evaluate_similarity",
]
