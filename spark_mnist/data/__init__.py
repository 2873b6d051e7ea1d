"""Training data: column checks, class labels, the profile of the rows, Parquet shards.

Runs on: driver, Spark task.
"""
