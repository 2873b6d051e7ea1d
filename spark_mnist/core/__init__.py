"""What all sides use: the plan, the channel, package checks, retries, metrics from sums.

Nothing here imports Spark, TensorFlow or Petastorm. Runs on: driver, rank, Spark task.
"""
