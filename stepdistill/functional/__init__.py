"""Pure tensor formulas: no networks, no randomness, no state."""
