"""Addresses of a host, by its name and by its way to the driver.

Runs on: driver, rank, Spark task.

Horovod makes two contexts of Gloo. The first listens at the interface in ``HOROVOD_GLOO_IFACE``.
The second, that of the process set of all ranks, forgets the interface and listens at the first
usable address of the host's name; where there is none, the process ends without an exception.
The probe of workers imports this module, so it imports no package.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from spark_mnist import errors

ANY_PORT = 9
"""Port of an address that is looked up, not connected to."""


def name_address() -> str | None:
    """Return the address that Gloo takes for this host's name; None where it finds none."""
    try:
        entries = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, _, _, _, address in entries:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.bind(address)
            return str(address[0])
    return None


def address_towards(host: str) -> str:
    """Return this host's address on the way to another; empty where that is not known."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, ANY_PORT))  # sends nothing
        return str(probe.getsockname()[0])
    return ""


def check() -> None:
    """Refuse a host on which Horovod cannot start.

    Raises:
        errors.ClusterError: The name of this host has no address.
    """
    if name_address() is None:
        raise errors.ClusterError(no_address(socket.gethostname(), "127.0.0.1"))


def no_address(name: str, address: str) -> str:
    """Return the message about a host whose name has no address.

    Args:
        name: Name of the host.
        address: Address that the name should have.
    """
    return (
        f"the name of host {name} does not resolve to an address of its own, which Horovod needs: "
        f"let its /etc/hosts say '{address} {name}'"
    )


def is_loopback(address: str) -> bool:
    """Return whether only the host itself reaches an address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
