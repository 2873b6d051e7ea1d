"""PySpark's own TorchDistributor, in an environment with PyTorch: two figures on stdout.

    .venv-torch/bin/python benchmarks/torch_peer.py ARRAYS mlp|cnn BATCH EPOCHS ROWS

Prints the seconds of a whole call, the second of its session, and the rows/s of two ranks in
training steps. The call writes the rows as Parquet, starts two ranks as Spark tasks, and trains by
DistributedDataParallel over Gloo, one thread a rank.
"""

import os
import shutil
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from pyspark.ml.torch.distributor import TorchDistributor
from pyspark.sql import SparkSession
from torch import nn

RANKS = 2


def mlp():
    """Return the network ``mlp`` of this library."""
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def cnn():
    """Return its network ``cnn``."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 32, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(7 * 7 * 64, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10),
    )  # fmt: skip


NETWORKS = {"mlp": mlp, "cnn": cnn}


def train(directory, network, batch, epochs):
    """Train on one rank's half of the rows; returns rows/s of all ranks in training steps."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    table = parquet.read_table(directory)
    content = b"".join(table["image"].to_pylist()[rank::RANKS])
    pixels = np.frombuffer(content, np.uint8).reshape(-1, 784).astype("float32") / 255
    images = torch.from_numpy(pixels)
    labels = torch.from_numpy(table["label"].to_numpy()[rank::RANKS].astype("int64"))
    model = DistributedDataParallel(NETWORKS[network]())
    optimizer = torch.optim.Adam(model.parameters(), 0.001 * RANKS)
    loss_of = nn.CrossEntropyLoss()
    steps = len(images) // batch
    begun = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            optimizer.zero_grad()
            loss_of(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    seconds = time.perf_counter() - begun
    distributed.destroy_process_group()
    return epochs * steps * batch * RANKS / seconds


def call(rows, home, network, batch, epochs):
    """Return the seconds of a whole call, and the rows/s in training steps."""
    directory = tempfile.mkdtemp(dir=home)
    begun = time.perf_counter()
    rows.write.mode("overwrite").parquet(directory)
    distributor = TorchDistributor(num_processes=RANKS, local_mode=False, use_gpu=False)
    rate = distributor.run(train, directory, network, batch, epochs)
    seconds = time.perf_counter() - begun
    shutil.rmtree(directory)
    return seconds, rate


def main(path, network, batch, epochs, count):
    """Return the figures of the second call of a session, and the seconds of the first."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.master("local[2]").config("spark.driver.memory", "4g")
    spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
    home = os.path.dirname(path)
    with np.load(path) as saved:
        images, labels = saved["images"][: int(count)], saved["labels"][: int(count)]
    source = f"{home}/torch.parquet"
    image = pa.array([row.tobytes() for row in images], pa.binary())
    parquet.write_table(pa.table({"image": image, "label": labels}), source, row_group_size=10_000)
    rows = spark.read.parquet(source)
    first, second = (call(rows, home, network, int(batch), int(epochs)) for _ in range(2))
    return *second, first[0]


if __name__ == "__main__":
    sys.stdout.write(" ".join(map(str, main(*sys.argv[1:]))) + "\n")
