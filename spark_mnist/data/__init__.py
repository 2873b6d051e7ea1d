"""From a DataFrame to shards: checked columns, classes, the profile of the rows, Parquet files.

Runs on: driver.
"""
