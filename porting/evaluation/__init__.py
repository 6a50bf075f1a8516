"""Evaluate two models on a whole data set: readers, metrics that merge in any order, and engines that run them."""
