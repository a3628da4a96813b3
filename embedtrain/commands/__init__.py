"""The commands, by what they are for: each module declares some and runs them."""
