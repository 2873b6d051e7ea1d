"""Score in one worker on two devices in turn, which TensorFlow is made to list as GPUs."""

import numpy as np
import tensorflow as tf
from pyspark import cloudpickle

from spark_mnist.core import plan
from spark_mnist.networks import array_files, registry
from spark_mnist.scoring import executor

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
devices = tf.config.list_logical_devices("CPU")
tf.config.list_logical_devices = lambda kind: devices if kind == "GPU" else []


class Shipment:
    def unpack(self):
        return weights


network = plan.Network(name="softmax", inputs=4, classes=3, outputs=(plan.Output(size=3),))
weights = array_files.pack_weights(registry.build(network))
encoding = plan.Encoding("float32", 1.0, 4)
spec = executor.ModelSpec("", network, cloudpickle.dumps(None), Shipment(), encoding, 1)
results = []
for gpu in ("1", "0", "1", None):
    executor.task.gpus = lambda gpu=gpu: (gpu,) if gpu else ()
    model = executor._model(spec, executor._gpu())
    results.append(model(np.ones((2, 4), "float32")))
    print(gpu, (executor._device(gpu) or "anywhere").rpartition("/")[2])
print("7", executor._device("7") or "anywhere")
assert all(np.array_equal(results[0], other) for other in results)
assert executor._model.cache_info().misses == 3
