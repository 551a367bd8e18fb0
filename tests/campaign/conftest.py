"""Counts what the campaign drew, and says so at its end."""

from collections import Counter

import pytest

DRAWS = Counter()


@pytest.fixture
def drawn(request):
    """Called once per draw."""
    name = request.node.originalname or request.node.name
    return lambda: DRAWS.update([name])


def pytest_terminal_summary(terminalreporter):
    if not DRAWS:
        return
    terminalreporter.section("draws")
    for name, count in sorted(DRAWS.items()):
        terminalreporter.write_line(f"{count:8,} {name}")
    terminalreporter.write_line(f"{sum(DRAWS.values()):8,} in all")
