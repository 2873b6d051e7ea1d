"""Prediction and evaluation: columns of scores, computed inside the executors.

Runs on: driver, Spark task.
"""
