"""Columns of a DataFrame as tensors."""
