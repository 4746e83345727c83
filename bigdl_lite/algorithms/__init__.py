"""Methods, free of Spark: values made of parts that fit by type."""

from bigdl_lite.algorithms.algorithm import Advance, Advancer, Combine, Local, Round, Side, Update, merge_buffers
from bigdl_lite.algorithms.catalogue import CATALOGUE, method

__all__ = ["CATALOGUE", "Advance", "Advancer", "Combine", "Local", "Round", "Side", "Update", "merge_buffers", "method"]
