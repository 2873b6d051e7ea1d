"""An agent that forks a rank, prints its process and its server's directory, and sleeps."""

import time
from multiprocessing import util

import psutil

from spark_mnist.launch import rank_process

child = rank_process.start("PATH|HOME|PYTHONPATH|VIRTUAL_ENV", {})
rank = psutil.Process(child.process.pid)
print(rank.pid, rank.ppid(), util.get_temp_dir(), flush=True)
time.sleep(600)
