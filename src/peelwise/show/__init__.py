"""What people see: terminal and HTML, made from records alone, never from a model."""
