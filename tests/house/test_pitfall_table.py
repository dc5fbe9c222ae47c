"""The table of pitfalls in docs/regimes/grpo.md names tests that exist, and leaves no number out."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tables() -> list[dict[int, list[str]]]:
    """For each of the two tables, the tests of every row by its number."""
    page = (ROOT / "docs" / "regimes" / "grpo.md").read_text().split("## Twenty pitfalls, six defects")[1]
    found: list[dict[int, list[str]]] = []
    for line in page.splitlines():
        row = re.match(r"\| (\d+) \|", line)
        if row:
            number = int(row[1])
            if number == 1:
                found.append({})
            found[-1][number] = re.findall(r"`([^`]*::[^`]+)`", line)
    return found


def test_no_number_is_left_out():
    pitfalls, defects = tables()
    assert list(pitfalls) == list(range(1, 21)) and list(defects) == list(range(1, 7))
    assert all(pitfalls.values()) and all(defects.values())


def test_every_named_test_exists():
    for table in tables():
        for names in table.values():
            file = ""
            for name in names:
                path, test = name.split("::")
                file = path or file
                source = (ROOT / "tests" / file).read_text()
                assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file} has no {test}"
