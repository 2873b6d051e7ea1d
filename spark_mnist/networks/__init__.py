"""Keras networks: from a description to a model and back, and their arrays as files.

Keras is imported where a model is built, not where this is imported.
Runs on: driver, rank, Spark task.
"""
