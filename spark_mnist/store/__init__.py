"""Store: named models with versions, on any file system.

Runs on: driver, rank, Spark task.
"""
