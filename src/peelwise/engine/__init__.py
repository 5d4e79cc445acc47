"""What the tasks share: a session on one model and probe, the sweep, refinement, witnesses and cost."""
