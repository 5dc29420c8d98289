"""Small values that orchestrate networks: what papers vary, passed into an objective's fields."""
