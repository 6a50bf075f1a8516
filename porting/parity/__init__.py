"""Comparing two models and judging what came out."""
