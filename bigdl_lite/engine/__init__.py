"""Engines: three ways to run the same recipe."""
