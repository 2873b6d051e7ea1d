"""One GPU for each rank. Runs on ranks.

Spark tells a task which GPU is its own; where it does not schedule GPUs, the ranks of a host take
them in turn.
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

VISIBLE = "CUDA_VISIBLE_DEVICES"


def claim(addresses: Sequence[str], local_rank: int) -> str:
    """Leave this rank one GPU, or none; to be called before TensorFlow looks for them.

    Args:
        addresses: Of the GPUs that Spark gave this rank's task.
        local_rank: Number of the rank among those of its host.

    Returns:
        What the rank computes on, in words.

    Raises:
        errors.ClusterError: Another rank would use the same GPU.
    """
    if addresses:
        os.environ[VISIBLE] = addresses[0]
    found = tf.config.list_physical_devices("GPU")
    if addresses and not found:
        logger.warning(
            "Spark gave this rank GPU %s on %s, and TensorFlow sees none: it trains on the CPU. "
            "Install tensorflow[and-cuda], and a driver on the host",
            *(addresses[0], socket.gethostname()),
        )
    if not addresses and found:
        if local_rank >= len(found):
            raise errors.ClusterError(
                f"{socket.gethostname()} has {len(found)} GPUs for more ranks: lower num_proc, or "
                "let Spark schedule them with spark.task.resource.gpu.amount=1"
            )
        found = [found[local_rank]]
        tf.config.set_visible_devices(found, "GPU")
    for gpu in found:
        tf.config.experimental.set_memory_growth(gpu, True)
    name = addresses[0] if addresses else str(local_rank) if found else ""
    _check_own(name)
    if not name:
        return channel.CPU
    return f"GPU {name}" if found else f"CPU, not GPU {name}"


def _check_own(name: str) -> None:
    """Refuse a GPU that two ranks would use.

    Raises:
        errors.ClusterError: There is one; on all ranks alike.
    """
    place = zlib.crc32(f"{socket.gethostname()} {name}".encode()) if name else 0
    places = [place for place in collectives.allgather_int(place) if place]
    if len(set(places)) < len(places):
        raise errors.ClusterError(
            "two ranks would share a GPU: give each task one of its own with "
            "spark.task.resource.gpu.amount=1"
        )
