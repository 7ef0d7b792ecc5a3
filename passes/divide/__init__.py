"""One step graph into the graphs that run: forward and update, batched layers, tasks, the tail."""
