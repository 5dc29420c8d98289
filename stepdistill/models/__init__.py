"""Networks and the few things wrapped around them."""
