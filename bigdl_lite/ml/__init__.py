"""The face that pyspark.ml users know."""
