"""From the names and axes of one framework to those of the other."""
