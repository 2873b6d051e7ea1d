"""The first fit of a session: seconds until its ranks train, and of the whole call, on stdout.

python -m benchmarks.first_fit PARQUET EPOCHS
"""

import sys
import tempfile
import time

import spark_mnist
from benchmarks.__main__ import session

if __name__ == "__main__":
    rows, epochs = session().read.parquet(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as store:
        options = {"batch_size": 128, "num_proc": 2, "train_validation_ratio": 1.0, "verbose": 0}
        begun = time.perf_counter()
        fit = spark_mnist.fit(rows, "mlp", epochs=epochs, store=store, **options)
        sys.stdout.write(f"{fit.timing.start} {time.perf_counter() - begun}\n")
