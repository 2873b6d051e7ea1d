"""What a Spark task knows of its place. Runs on: Spark task."""

from __future__ import annotations

import socket

from pyspark import TaskContext


def gpus() -> tuple[str, ...]:
    """In a task: the addresses of the GPUs that Spark gave it, where it gives any."""
    context = TaskContext.get()
    resource = context.resources().get("gpu") if context else None
    return tuple(resource.addresses) if resource else ()


def place() -> str:
    """In a task: the name of its machine, and its GPUs."""
    name, addresses = socket.gethostname(), gpus()
    return f"{name} (GPU {', '.join(addresses)})" if addresses else name
