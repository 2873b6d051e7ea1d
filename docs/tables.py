"""Write the tables of the documentation that follow from code and measurements.

    PYTHONPATH=. python docs/tables.py [--check]

The options come from ``spark_mnist.options``, the ratios from ``docs/bench.json``, which is what
``make bench ARGS=--json`` printed, and their targets from ``benchmarks``. With ``--check`` nothing
is written: the exit code says whether a page differs.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.__main__ import COMPARISONS
from spark_mnist import options

DOCS = Path(__file__).parent


def option_rows() -> Iterator[str]:
    """Yield the table of options."""
    yield "| option | of | meaning | allowed | default |"
    yield "|---|---|---|---|---|"
    for name, field in options.FIELDS.items():
        operations = options.operations_with(name)
        of = "all" if len(operations) == len(options.OPERATIONS) else ", ".join(operations)
        default = options.default_text(name)
        option_type = field.metadata["type"]
        yield f"| `{name}` | {of} | {field.metadata['doc']} | {option_type.words} | {default} |"


def bench_rows() -> Iterator[str]:
    """Yield a table of comparisons for each run, with its date and machine."""
    for line in (DOCS / "bench.json").read_text().splitlines():
        result = json.loads(line)
        if "machine" in result:
            yield f"\nMeasured on {result['date']}: {result['machine']}.\n"
            yield "| comparison | ratio | target | met |"
            yield "|---|---|---|---|"
            continue
        comparison = COMPARISONS[result["name"]]
        sign = "<=" if comparison.at_most else ">="
        met = "yes" if comparison.met(result["ratio"]) else "no"
        target = f"{sign} {comparison.target:g}"
        yield f"| {comparison.what} | {result['ratio']:,.2f} | {target} | {met} |"


TABLES = {"options.md": ("options", option_rows), "performance.md": ("bench", bench_rows)}


def with_table(page: str) -> str:
    """Return a page with its table as it must be."""
    name, rows = TABLES[page]
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, rest = (DOCS / page).read_text().split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n" + "\n".join(rows()) + f"\n\n{end}{after}"


def main(arguments: list[str]) -> int:
    """Write the tables, or check them."""
    stale = [page for page in TABLES if with_table(page) != (DOCS / page).read_text()]
    if "--check" in arguments:
        sys.stderr.writelines(
            f"docs/{page} differs: run PYTHONPATH=. python docs/tables.py\n" for page in stale
        )
        return len(stale)
    for page in stale:
        (DOCS / page).write_text(with_table(page))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
