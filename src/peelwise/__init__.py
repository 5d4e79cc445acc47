"""peelwise: how far each part of a transformer is from what it could achieve, with proof."""
