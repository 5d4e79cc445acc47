"""Pure tensors: sums over tokens and damped solves. Nothing here knows what a model is."""
