"""Ranks, collectives, and explaining failed jobs."""
