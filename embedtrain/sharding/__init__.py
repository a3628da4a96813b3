"""Layouts: the arithmetic that maps ids to slots and ranks, without a process group."""
