"""Send signs of life until the driver is gone: orphan.py PORT KEY."""

import sys
import time

from spark_mnist.core import channel

address = channel.Address("127.0.0.1", int(sys.argv[1]), bytes.fromhex(sys.argv[2]))
with channel.HeartbeatClient(address, disconnect_timeout=1.0):
    time.sleep(60)
