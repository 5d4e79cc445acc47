"""An event of somebody else's trainer in, `Monitor.step` out, and nothing else."""
