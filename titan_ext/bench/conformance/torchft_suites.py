"""torchft's own tests of LocalSGD and DiLoCo, which its package contains, with titan_ext's drop-in in their place.

The suites ask torchft's private attributes in some tests; those say nothing of ours and are told as skipped. The recorded
traces of its regression suite are not in the package: they are recorded anew with torchft's own classes, in the
same run, and ours must come to the same parameters after each step.
"""

import logging
import unittest
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

from titan_ext.bench.conformance.checks import Check, Part

_PRIVATE = ("_fragments", "extract_local_tensor")


def _unit_tests(part: str) -> Iterator[Check]:
    import torchft.local_sgd_test as suite

    from titan_ext.semi_sync.compat import torchft as ours

    kept = suite.LocalSGD, suite.DiLoCo
    suite.LocalSGD, suite.DiLoCo = ours.LocalSGD, ours.DiLoCo  # type: ignore[misc,assignment]
    try:
        for test in _tests(unittest.defaultTestLoader.loadTestsFromModule(suite)):
            yield _outcome(part, test)
    finally:
        suite.LocalSGD, suite.DiLoCo = kept  # type: ignore[misc]


def _outcome(part: str, test: unittest.TestCase) -> Check:
    name = test.id().removeprefix("torchft.")
    result = unittest.TestResult()
    if "extract_local_tensor" in name:
        return Check(part=part, name=name, outcome="skipped", detail="tests torchft's own helper")
    test.run(result)
    problems = [text for _, text in [*result.errors, *result.failures]]
    if not problems:
        reason = result.skipped[0][1] if result.skipped else ""
        return Check(
            part=part, name=name, outcome="skipped" if reason else "holds", detail=reason or "torchft's test passes"
        )
    last = problems[0].strip().splitlines()[-1]
    private = any(f"'{each}'" in last for each in _PRIVATE)
    return Check(
        part=part,
        name=name,
        outcome="skipped" if private else "differs",
        detail=f"torchft's private: {last}" if private else last,
    )


def _regressions(part: str) -> Iterator[Check]:
    """Each configuration once with torchft's classes, which records, and once with ours, which is compared."""
    suite: Any = import_module("torchft.diloco_regression_test")
    from titan_ext.semi_sync.compat import torchft as ours

    logging.disable(logging.WARNING)
    theirs, handle = suite.DiLoCo, suite.handle_fixture
    traces: dict[str, Any] = {}
    try:
        for test in _tests(unittest.defaultTestLoader.loadTestsFromTestCase(suite.DiLoCoMockedUpdateTest)):
            if "mocked_updates" in test.id():
                suite.handle_fixture = lambda file, results: traces.__setitem__(file, results)
                recorded = _outcome(part, test)
                if recorded.outcome == "holds":
                    suite.DiLoCo, suite.handle_fixture = ours.DiLoCo, lambda file, results: traces[file]
                    recorded = _outcome(part, type(test)(test._testMethodName))
                    suite.DiLoCo = theirs
                if recorded.outcome == "holds":
                    recorded = replace(recorded, detail="the parameters of torchft's classes after each step")
                yield recorded
    finally:
        suite.DiLoCo, suite.handle_fixture = theirs, handle
        logging.disable(logging.NOTSET)


def _tests(suite: Any) -> Iterator[Any]:
    for each in suite:
        if isinstance(each, unittest.TestSuite):
            yield from _tests(each)
        else:
            yield each


TORCHFT = Part({"torchft": "torchft", "parameterized": "parameterized"}, _unit_tests)
TORCHFT_TRACES = Part({"torchft": "torchft", "parameterized": "parameterized"}, _regressions)
