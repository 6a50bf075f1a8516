"""Finding the key map between two models that nobody has mapped, by running them."""
