"""What quantising a model cost and saved, on the terminal."""
