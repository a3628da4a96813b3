"""Planning a run: memory, exchange and a lower bound of the step time, before it is started."""
