"""One GPU for each rank. Runs on: rank.

Spark assigns a GPU to a task; where Spark does not schedule GPUs, the ranks of a host take the
host's GPUs in turn.
"""

from __future__ import annotations

import logging
import os
import socket
import zlib
from collections.abc import Sequence

import tensorflow as tf

from spark_mnist import errors
from spark_mnist.core import channel
from spark_mnist.ranks import collectives

logger = logging.getLogger(__name__)

HOST_ID = "HOROVOD_HOSTNAME"
"""Environment variable with the id of the rank's host, which the driver gave; names may repeat."""
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
"""Environment variable with the GPUs that CUDA shows to a process."""


def claim(addresses: Sequence[str], local_rank: int) -> str:
    """Restrict this rank to one GPU, or none; call it before TensorFlow looks for GPUs.

    Args:
        addresses: Addresses of the GPUs that Spark gave this rank's task.
        local_rank: Number of the rank among those of its host.

    Returns:
        Device that the rank computes on, in words.

    Raises:
        errors.ClusterError: Another rank would use the same GPU.
    """
    if addresses:
        os.environ[VISIBLE_DEVICES] = addresses[0]
    devices = tf.config.list_physical_devices("GPU")
    if addresses and not devices:
        logger.warning(
            "Spark gave this rank GPU %s on %s, and TensorFlow sees none: it trains on the CPU. "
            "Install tensorflow[and-cuda], and a driver on the host",
            *(addresses[0], socket.gethostname()),
        )
    if not addresses and devices:
        if local_rank >= len(devices):
            raise errors.ClusterError(
                f"{socket.gethostname()} has {len(devices)} GPUs for more ranks: lower num_proc, "
                "or let Spark schedule them with spark.task.resource.gpu.amount=1"
            )
        devices = [devices[local_rank]]
        tf.config.set_visible_devices(devices, "GPU")
    for device in devices:
        tf.config.experimental.set_memory_growth(device, True)
    name = addresses[0] if addresses else str(local_rank) if devices else ""
    _check_not_shared(name)
    if not name:
        return channel.CPU
    return f"GPU {name}" if devices else f"CPU, not GPU {name}"


def _check_not_shared(name: str) -> None:
    """Refuse a GPU that two ranks would use.

    Raises:
        errors.ClusterError: Two ranks would use one GPU; raised on all ranks alike.
    """
    gpu_hash = zlib.crc32(f"{os.environ.get(HOST_ID)} {name}".encode()) if name else 0
    gpu_hashes = [other for other in collectives.allgather_int(gpu_hash) if other]
    if len(set(gpu_hashes)) < len(gpu_hashes):
        raise errors.ClusterError(
            "two ranks would share a GPU: give each task one of its own with "
            "spark.task.resource.gpu.amount=1"
        )
