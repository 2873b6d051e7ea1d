"""The table of ``make faults``: what was tried, and how much of it ended as it should."""

from __future__ import annotations

import pytest

from tests.conftest import CaseCounter

SCENARIOS = {
    "test_ranks.py": "fault scenarios",
    "test_driver.py": "fault scenarios",
    "test_executors.py": "fault scenarios",
    "test_lost_tasks.py": "fault scenarios",
    "test_slow_imports.py": "fault scenarios",
    "test_streams.py": "fault scenarios",
    "test_tuning.py": "fault scenarios",
    "test_bad_input.py": "bad inputs refused before a rank starts",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.when == "call" and (what := SCENARIOS.get(item.path.name)):
        CaseCounter(what).add(passed=report.passed)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not CaseCounter.full:
        return
    terminalreporter.section("what was tried")
    terminalreporter.line("| what | tried | as it should be |")
    terminalreporter.line("|---|---|---|")
    for what, (tried, passed) in sorted(CaseCounter.counts.items()):
        terminalreporter.line(f"| {what} | {tried:,} | {passed:,} |")
