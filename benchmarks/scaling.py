"""Predicts the step time of N ranks from fits on one and on two; prints ``scaling.md``.

    MNIST_DIR=/path/to/idx python -m benchmarks.scaling [--gigabits 10] [--hop 50]

The line through two sizes of gradients is checked against a third, which it has not seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.__main__ import machine, session
from benchmarks.data import Data
from benchmarks.sides import Sides

FITTED, CHECKED = ((32, 32), (1024, 512)), (512, 256)
"""Units of the networks, with as many tensors each, that the line is fitted to and checked on."""
BATCH = 128
RANKS = (2, 8, 64, 512)
RANKS_PER_HOST = 8
"""Ranks of a host that average among themselves first, where allreduce is hierarchical."""
WORKLOADS = {
    "mlp, batch 128": {"network": "mlp", "batch_size": 128},
    "mlp, batch 4,096": {"network": "mlp", "batch_size": 4096},
    "cnn, batch 64": {"network": "cnn", "batch_size": 64},
    "cnn, batch 512": {"network": "cnn", "batch_size": 512},
}
"""Models that the prediction covers."""
PARAMETERS = {"mlp": 104_938, "cnn": 3_274_634}


@dataclass(frozen=True)
class Allreduce:
    """Seconds that averaging gradients adds to a step: the parts of a ring, and its overhead."""

    fixed: float
    """Seconds whatever the number of ranks: agreeing on what is ready, threads that wake up."""
    hop: float
    """Seconds from one rank to the next, of which a ring has 2 (N - 1)."""
    bandwidth: float
    """Bytes a second out of one rank."""

    def seconds(self, ranks: int, size: int) -> float:
        """For gradients of so many bytes."""
        if ranks == 1:
            return 0.0
        sent = 2 * (ranks - 1) / ranks * size
        return self.fixed + 2 * (ranks - 1) * self.hop + sent / self.bandwidth


def hierarchical_seconds(local: Allreduce, network: Allreduce, ranks: int, size: int) -> float:
    """Seconds that averaging adds where the ranks of a host do it first, and then the hosts.

    What is fixed is paid once.

    Args:
        local: Costs between two ranks of a host.
        network: Costs between two hosts.
        ranks: Number of ranks, a multiple of ``RANKS_PER_HOST``.
        size: Bytes of gradients.
    """
    among_hosts = network.seconds(ranks // RANKS_PER_HOST, size)
    return local.seconds(RANKS_PER_HOST, size) + max(0.0, among_hosts - network.fixed)


class Steps:
    """Measures steps on this machine."""

    def __init__(self, sides: Sides, rounds: int) -> None:
        self._sides, self._rounds = sides, rounds

    def seconds(self, ranks: int, **options: object) -> float:
        """Seconds of a step: what more epochs take, so that tracing the graph is left out."""
        return statistics.median(self._once(ranks, options) for _ in range(self._rounds))

    def _once(self, ranks: int, options: dict[str, object]) -> float:
        data = self._sides.data
        rows = data.pictures.limit(6_000) if options.get("network") == "cnn" else data.pictures
        few, many = (1, 3) if options.get("network") == "cnn" else (1, 9)
        spent = [
            self._sides.fit(rows, num_proc=ranks, epochs=epochs, **options).timing.train
            for epochs in (few, many)
        ]
        per_rank = -(-rows.count() // ranks)
        steps = -(-per_rank // int(str(options["batch_size"])))
        return (spent[1] - spent[0]) / (many - few) / steps


def gradients(hidden: tuple[int, ...]) -> int:
    """Bytes of the gradients of dense layers between 784 pixels and ten classes."""
    widths = (784, *hidden, 10)
    return 4 * sum((inputs + 1) * units for inputs, units in itertools.pairwise(widths))


def fitted(added: dict[tuple[int, ...], float]) -> Allreduce:
    """Fit a line through what a second rank adds to a step, by units of the network."""
    (small, low), (large, high) = sorted((gradients(hidden), t) for hidden, t in added.items())
    slope = (high - low) / (large - small)
    return Allreduce(fixed=low - slope * small, hop=0.0, bandwidth=1 / slope)


def main(arguments: list[str]) -> int:
    """Measure, fit, check, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--gigabits", type=float, default=10, help="a second, between hosts")
    parser.add_argument("--hop", type=float, default=50, help="microseconds between hosts")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as home:
        data = Data(session(), Path(home))
        steps = Steps(Sides(data), chosen.rounds)
        measured = {}
        for hidden in (*FITTED, CHECKED):
            options = {"hidden": ",".join(map(str, hidden)), "batch_size": BATCH}
            measured[hidden] = [steps.seconds(ranks, **options) for ranks in (1, 2)]
        alone = {name: steps.seconds(1, **options) for name, options in WORKLOADS.items()}
        here = machine(data)
    added = {hidden: measured[hidden][1] - measured[hidden][0] for hidden in FITTED}
    local = fitted(added)
    network = dataclasses.replace(
        local,
        hop=chosen.hop / 1e6,
        bandwidth=min(local.bandwidth, chosen.gigabits * 1e9 / 8),
    )
    sys.stdout.write(
        PAGE.format(
            machine=here,
            fixed=local.fixed * 1e3,
            bandwidth=local.bandwidth / 2**20,
            gigabits=chosen.gigabits,
            hop=chosen.hop,
            measured=_measured(measured, local),
            predicted=_predicted(alone, network.seconds),
            per_host=RANKS_PER_HOST,
            hierarchical=_predicted(
                alone, functools.partial(hierarchical_seconds, local, network), RANKS[2:]
            ),
        )
    )
    return 0


def _measured(measured: dict[tuple[int, ...], list[float]], local: Allreduce) -> str:
    lines = []
    for hidden, (one, two) in measured.items():
        size = gradients(hidden)
        said = one + local.seconds(2, size)
        use = "checked" if hidden == CHECKED else "fitted"
        off = f"{said / two - 1:+.0%}" if hidden == CHECKED else ""
        name = ",".join(map(str, hidden))
        lines.append(
            f"| `{name}` | {size / 2**20:.1f} | {one * 1e3:.2f} | {two * 1e3:.2f} "
            f"| {said * 1e3:.2f} | {use} {off}|"
        )
    return "\n".join(lines)


def _predicted(
    alone: dict[str, float],
    added: Callable[[int, int], float],
    numbers: Sequence[int] = RANKS,
) -> str:
    """Make the rows of a table from what averaging adds to a step, by ranks and bytes."""
    lines = []
    for name, compute in alone.items():
        size = 4 * PARAMETERS[str(WORKLOADS[name]["network"])]
        shares = [compute / (compute + added(ranks, size)) for ranks in numbers]
        cells = " | ".join(f"{share:.0%}" for share in shares)
        lines.append(f"| {name} | {size / 2**20:.1f} | {compute * 1e3:.1f} | {cells} |")
    return "\n".join(lines)


PAGE = """# How far it scales

`python -m benchmarks.scaling` measures this and prints this page.

A step of N ranks takes

    compute + fixed + 2 (N - 1) hop + 2 (N - 1) / N * bytes / bandwidth

that is one rank's step on its batch, and then a ring of allreduces: each rank sends all but an Nth
of its gradients twice, in 2 (N - 1) hops. `fixed` is what ranks need to agree on what is ready.
Nothing is taken off for allreduces that run while the backward pass still computes, so that this is
the least that can be expected.

## Measured

{machine}. The mlp with other `hidden` units, batch 128, one thread a rank, milliseconds of a step:

| hidden | gradients, MiB | 1 rank | 2 ranks | the model for 2 | |
|---|---|---|---|---|---|
{measured}

Two of them give the line: {fixed:.2f} ms fixed, and {bandwidth:,.0f} MiB/s between two ranks that
share a machine, its memory and its cores. The third is what the line has not seen.

## What it says for more ranks

With {gigabits:g} Gbit/s and {hop:g} microseconds a hop between hosts (`--gigabits`, `--hop`), and
cores as fast as here: the share of N times one rank's rows/s that N ranks reach.

| | gradients, MiB | step of one rank, ms | 2 ranks | 8 ranks | 64 ranks | 512 ranks |
|---|---|---|---|---|---|---|
{predicted}

The same where the {per_host} ranks of a host average first, as fast as here, and one of them with
the other hosts. Horovod does so with NCCL and `HOROVOD_HIERARCHICAL_ALLREDUCE=1`, not with Gloo.

| | gradients, MiB | step of one rank, ms | 64 ranks | 512 ranks |
|---|---|---|---|---|
{hierarchical}

- The share is that of compute in a step, so what helps is more compute for the same bytes: a larger
  `batch_size`. The learning rate follows the ranks by itself; `warmup_epochs` lets it climb.
- What the bytes cost hardly grows from 8 ranks on; the hops of the ring grow with the ranks, and
  are paid in each step.
- Horovod's authors report 90 % for Inception V3 and ResNet-101 on 512 GPUs, and 68 % for VGG-16,
  over 25 Gbit/s with RoCE (<https://horovod.readthedocs.io/en/stable/benchmarks.html>). It is the
  same law: VGG-16 has the most bytes for its compute.
"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
