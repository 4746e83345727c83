"""Vectors as bytes."""
