"""Adapters of older packages to current libraries. Runs on: driver, rank."""
