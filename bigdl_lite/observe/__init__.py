"""Watching a fit."""
