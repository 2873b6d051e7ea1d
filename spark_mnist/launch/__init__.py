"""Ranks from start to end: agents in Spark tasks, their ranks, the watch over both.

Runs on: driver; ``agent`` and ``rank_process`` in Spark tasks.
"""
