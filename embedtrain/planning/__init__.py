"""What a run needs on each rank, and how long its steps take at least, before it is started."""
