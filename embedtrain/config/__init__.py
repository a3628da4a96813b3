"""The sections of a configuration that every recipe has."""
