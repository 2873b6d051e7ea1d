"""Ranks from start to end: agents in Spark tasks, their ranks, and the watchdog over both.

``agent`` and ``rank_process`` run in Spark tasks, the other modules on the driver.
Runs on: driver, Spark task.
"""
