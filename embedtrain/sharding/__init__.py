"""Where each row of a table lies: pure arithmetic, no process group."""
