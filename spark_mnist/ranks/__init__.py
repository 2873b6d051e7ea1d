"""All that runs on a rank, and nothing else: reading shards, training, averaging, reporting.

No module here imports a package of the driver, or PySpark. Runs on: rank.
"""
