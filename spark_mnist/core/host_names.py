"""Addresses of a host, by its name and by its way to the driver, and which of them Horovod uses.

Runs on: driver, rank, Spark task.

Horovod makes two contexts of Gloo. The first listens at the interface in ``HOROVOD_GLOO_IFACE``.
The second, that of the process set of all ranks, forgets the interface and listens at the first
usable address of the host's name; where there is none, the process ends without an exception.
Compiled with the ``CXXFLAGS`` of pyproject.toml, Horovod keeps to the interface, and names do not
matter. The probe of workers imports this module, so it imports no package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import mmap
import socket
from pathlib import Path

from spark_mnist import errors

ANY_PORT = 9
"""Port of an address that is looked up, not connected to."""
LOOPBACK_INDEX = 1
"""Index of the interface by which a host reaches itself, on Linux and on macOS."""
KEEPS_INTERFACE = b"InitializeProcessSetAtIface"
"""Name of a method in a Horovod that keeps to the interface; others have it by another name."""


def loopback() -> str:
    """Return the name of the interface by which this host reaches itself; empty without one."""
    return dict(socket.if_nameindex()).get(LOOPBACK_INDEX, "")


def keeps_interface() -> bool:
    """Return whether the installed Horovod listens at ``HOROVOD_GLOO_IFACE`` only."""
    spec = importlib.util.find_spec("horovod")
    for directory in (spec and spec.submodule_search_locations) or []:
        for library in Path(directory, "tensorflow").glob("mpi_lib*.so"):
            with (
                library.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                return content.find(KEEPS_INTERFACE) >= 0
    return False


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


def check(interface: str) -> None:
    """Refuse a host on which Horovod cannot start.

    Args:
        interface: Value of ``HOROVOD_GLOO_IFACE``; empty without one.

    Raises:
        errors.ClusterError: Horovod needs an address of this host's name, and there is none.
    """
    if name_address() is None and not (interface and keeps_interface()):
        raise errors.ClusterError(no_address(socket.gethostname(), "127.0.0.1"))


def no_address(name: str, address: str) -> str:
    """Return the message about a host whose name has no address.

    Args:
        name: Name of the host.
        address: Address that the name should have.
    """
    return (
        f"the name of host {name} does not resolve to an address of its own, which the Horovod "
        f"there needs: {remedy(name, address)}"
    )


def remedy(name: str, address: str) -> str:
    """Return what a user can do about a name without the address that Horovod needs."""
    return (
        f"let its /etc/hosts say '{address} {name}', or compile Horovod with the CXXFLAGS of "
        "spark_mnist's README, with which names do not matter"
    )


def is_loopback(address: str) -> bool:
    """Return whether only the host itself reaches an address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
