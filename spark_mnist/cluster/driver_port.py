"""The address and the port on which the driver listens for agents and ranks. Runs on: driver."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from pyspark.sql import SparkSession

from spark_mnist import errors
from spark_mnist.core import channel


def _driver_address(spark: SparkSession) -> tuple[str, str]:
    """Return the host by which executors reach the driver, and the address on which it listens."""
    conf = spark.sparkContext.getConf()
    host = str(conf.get("spark.driver.host"))
    return host, str(conf.get("spark.driver.bindAddress", host))


def listen(
    spark: SparkSession,
    ports: Sequence[int],
    receive: Callable[[channel.Event], None],
    answer: Callable[[bytes], bytes | None],
) -> channel.HeartbeatServer:
    """Make the server that listens for ranks and agents.

    Raises:
        errors.ClusterError: No port is free.
    """
    host, bind = _driver_address(spark)
    try:
        return channel.HeartbeatServer(host, bind, receive, answer, ports)
    except OSError as error:
        raise _listen_error(ports, bind, error) from error


def check_port(spark: SparkSession, ports: Sequence[int]) -> None:
    """Check that the driver can listen for its ranks on its address and one of the ports.

    Raises:
        errors.ClusterError: The driver has no IPv4 address, or none of the ports is free.
    """
    host, bind = _driver_address(spark)
    for setting, address in (("spark.driver.host", host), ("spark.driver.bindAddress", bind)):
        try:
            socket.getaddrinfo(address, None, socket.AF_INET)
        except OSError as error:
            raise errors.ClusterError(
                f"{setting}={address} has no IPv4 address ({error}), and ranks find each other "
                "over IPv4 alone: set it to an address, or a name, that executors reach over IPv4"
            ) from error
    try:
        channel.listen(bind, ports).close()
    except OSError as error:
        raise _listen_error(ports, bind, error) from error


def _listen_error(ports: Sequence[int], bind: str, error: OSError) -> errors.ClusterError:
    ports_text = f"port {ports[0]}" if len(ports) == 1 else f"a port of {ports[0]} to {ports[-1]}"
    return errors.ClusterError(
        f"the driver cannot listen on {ports_text} of {bind} ({error.strerror}): give port, or "
        "Spark's setting spark.mnist.port, a range with a free port for each fit that runs on this "
        "machine"
    )
