"""What a run will need and how long its steps will take, before it is started."""
