"""Predict and evaluate: columns of scores, computed inside the executors.

Runs on: driver; ``executor`` in Spark tasks.
"""
