"""The commands: each module declares and implements the command of its name."""
