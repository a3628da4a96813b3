"""The commands: the module of a command is named after it, and holds its declaration and its body."""
