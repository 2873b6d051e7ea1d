"""Publish a version, and die at the given file operation: killed_writer.py STORE NUMBER."""

import os
import signal
import sys

from spark_mnist.store.model_store import Store

models, number = Store(sys.argv[1]), int(sys.argv[2])
count = 0


def step(event, args):
    global count
    if event in ("open", "os.mkdir", "os.rename") and sys.argv[1] in str(args[0]):
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(step)
models.publish("m", {"weights.npz": b"new", "optimizer.npz": b"slots"}, lambda v: {"epochs": v})
