"""Compares two models and judges the result."""
