"""Events of third-party trainers in, `Monitor.step` out, and nothing else."""
