"""Write the curves of an epoch where TensorBoard is not installed."""

import sys

sys.modules["tensorboard"] = None

from spark_mnist.core import plan  # noqa: E402
from spark_mnist.ranks import summaries  # noqa: E402

with summaries.SummaryWriter() as writer:
    record = plan.EpochRecord(epoch=1, losses={"val_loss": 0.5}, metrics={})
    writer.epoch(record, 0.1)
    (train, validation) = sorted(writer.files())
assert validation.startswith("logs/validation/events.out"), validation
