"""The models that `embedtrain train` knows: one folder each, and what they share."""
