"""Values that driver and ranks share, and the messages between them.

Nothing here imports Spark, TensorFlow or Petastorm. Runs on: driver, rank, Spark task.
"""
