"""Modules that run on a rank: they read shards, train, average gradients and report.

No module here imports a package of the driver, or PySpark. Runs on: rank.
"""
