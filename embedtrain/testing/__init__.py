"""What tests need to run a function on several ranks. Imported by tests only."""
