"""Machine and GPUs of a Spark task. Runs on: Spark task."""

from __future__ import annotations

import socket

from pyspark import TaskContext


def gpus() -> tuple[str, ...]:
    """Return the addresses of the GPUs that Spark gave the current task, if any."""
    context = TaskContext.get()
    resource = context.resources().get("gpu") if context else None
    return tuple(resource.addresses) if resource else ()


def place() -> str:
    """Return the name of the current task's machine, with the task's GPUs."""
    name, addresses = socket.gethostname(), gpus()
    return f"{name} (GPU {', '.join(addresses)})" if addresses else name
