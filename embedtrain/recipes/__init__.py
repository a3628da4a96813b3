"""The models that `embedtrain train` knows, a folder each, and what a recipe is; to write one, use `recipes.api`."""
