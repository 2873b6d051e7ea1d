"""Named models with versions, on any file system.

Runs on: driver, rank 0.
"""
