"""The models that `embedtrain train` can train, one folder per model; to write your own, use `recipes.api`."""
