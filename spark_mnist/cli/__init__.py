"""The command ``mymnist``.

Runs on: driver.
"""
