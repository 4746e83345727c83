"""Hard data and slow machines, to try a method on before it is trusted."""

from bigdl_lite.testing.delays import Delays, Slowed, slowed
from bigdl_lite.testing.skew import label_skew, skew_of, skewed

__all__ = ["Delays", "Slowed", "label_skew", "skew_of", "skewed", "slowed"]
