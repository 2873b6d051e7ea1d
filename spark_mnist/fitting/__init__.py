"""One fit from its options to a published version.

Runs on: driver.
"""
