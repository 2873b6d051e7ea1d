"""Print a shard's memory, as a multiple of the cache."""

import itertools
import resource

import tensorflow as tf

from spark_mnist.core import plan, sharding
from spark_mnist.ranks import batches

cache = 256 << 20
shards = plan.Shards(urls=(), rows=0, encoding=plan.Encoding("float32", 1.0, 4))
count = cache // (shards.encoding.row_bytes + batches.ROW_OVERHEAD_BYTES)
tf.constant(1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
features = batches._aligned_array((count, 4), "float32")
labels = batches._aligned_array((count,), "int32")
features[:], labels[:] = 1, 0
shard = batches.InMemory(shards, (features, labels))
division = sharding.RowSharding(size=1, rows=count, batch_size=65536)
for epoch in range(3):
    for _ in itertools.islice(shard.training(division, rank=0, seed=0, epoch=epoch), 9):
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / cache)
