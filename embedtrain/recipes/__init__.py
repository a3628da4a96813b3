"""The models that `embedtrain train` knows, a folder each, and what a recipe is; `recipes.api` has the names to write one."""
