"""Seconds that the ranks of the first fit of a session take to start, on stdout.

python -m benchmarks.first_fit PARQUET
"""

import sys
import tempfile

import spark_mnist
from benchmarks.__main__ import session

if __name__ == "__main__":
    rows = session().read.parquet(sys.argv[1])
    with tempfile.TemporaryDirectory() as store:
        options = {"epochs": 1, "batch_size": 128, "num_proc": 2, "verbose": 0, "store": store}
        sys.stdout.write(f"{spark_mnist.fit(rows, 'mlp', **options).timing.start}\n")
