import json
from types import SimpleNamespace

import pytest

from tests import support


def reports(tmp_path, change=None):
    """Files of runs in which each row was shown, but for what `change` does."""
    paths = []
    for backend in support.BACKENDS:
        passed = [
            {
                "test": "tests/test_a.py::test_it[1]",
                "section": s,
                "row": r,
                "error": None,
            }
            for s, rows in support.ROWS.items()
            for r in rows
        ]
        if change and backend == "jax":
            change(passed)
        path = tmp_path / f"{backend}.json"
        path.write_text(json.dumps({"backend": backend, "passed": passed}))
        paths.append(str(path))
    return [*paths, "--output", str(tmp_path / "page.md")]


def test_each_row_has_its_tests(tmp_path):
    def change(passed):
        passed.append(passed[0] | {"test": "tests/test_b.py::TestC::test_that"})
        passed[1] |= {"error": "ValueError: no"}

    support.main(reports(tmp_path, change))
    lines = (tmp_path / "page.md").read_text().splitlines()
    first, second = lines[lines.index("## Labels") + 4 :][:2]
    it, that = "[it](../tests/test_a.py)", "[that](../tests/test_b.py)"
    assert first == f"| sparse | {it} | {it}<br>{that} | {it} |"
    assert second == f"| one-hot | {it} | *ValueError: no*<br>{it} | {it} |"
    assert sum(line.startswith("| ") for line in lines) == (
        sum(map(len, support.ROWS.values())) + 2 * len(support.ROWS)
    )


def test_no_cell_stays_empty(tmp_path):
    arguments = reports(tmp_path, lambda passed: passed.pop(2))
    with pytest.raises(SystemExit, match=r"(?s)1 cell.*Labels: soft and smoothed: jax"):
        support.main(arguments)
    assert not (tmp_path / "page.md").exists()


def test_check(tmp_path):
    arguments = reports(tmp_path)
    with pytest.raises(SystemExit, match="is not what the tests show"):
        support.main([*arguments, "--check"])
    support.main(arguments)
    support.main([*arguments, "--check"])


def test_only_what_passed_is_kept(tmp_path):
    path = tmp_path / "results" / "jax.json"
    report, mark = support.Report(path, "jax"), {"section": "Labels", "row": "sparse"}
    for outcome in ("passed", "failed", "skipped"):
        for when in ("setup", "call"):
            for properties in ([("support", mark | {"error": outcome})], [("x", 1)]):
                done = SimpleNamespace(
                    when=when,
                    passed=outcome == "passed",
                    nodeid="tests/test_a.py::test_it",
                    user_properties=properties,
                )
                report.pytest_runtest_logreport(done)
    report.pytest_sessionfinish()
    assert json.loads(path.read_text()) == {
        "backend": "jax",
        "passed": [mark | {"error": "passed", "test": "tests/test_a.py::test_it"}],
    }


def test_marks(request):
    request.node.add_marker(pytest.mark.supports("Labels", "sparse", "one-hot"))
    request.node.add_marker(pytest.mark.refuses("Models", "nested", error="no"))
    assert support.marks(request.node) == [
        {"section": "Labels", "row": "sparse", "error": None},
        {"section": "Labels", "row": "one-hot", "error": None},
        {"section": "Models", "row": "nested", "error": "no"},
    ]
    for wrong in (("Labels", "nested"), ("Labels",), ("Label", "sparse")):
        request.node.add_marker(pytest.mark.supports(*wrong))
        with pytest.raises(ValueError, match=r"test_marks: not in tests/support.py"):
            support.marks(request.node)
        request.node.own_markers.pop()
