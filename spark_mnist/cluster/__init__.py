"""The Spark session and what it runs on: slots, settings, the Python of its workers.

Runs on: driver.
"""
