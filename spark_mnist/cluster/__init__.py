"""The Spark session and its cluster: slots, settings, the Python of its workers.

Runs on: driver, Spark task.
"""
