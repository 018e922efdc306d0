"""What a plan measures itself."""

from collections.abc import Callable

import pytest

from tests.config.conftest import GOOD, write  # noqa: F401  (fixture)
from titan_ext import cli
from titan_ext.errors import RunError, UserError
from titan_ext.links.probe import answering
from titan_ext.planner.probe import probe_links, probe_steps


def test_a_link_that_was_measured_needs_no_flag(write: Callable, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    with answering(0, "127.0.0.1") as port:
        assert cli.main(["plan", write(), "--probe-link", f"alpha-beta=127.0.0.1:{port}", "--step", "1s"]) == 0
    assert "between all sites" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["alpha-beta", "alpha-gamma=host:1", "alpha-beta=host"])
def test_probes_of_links_that_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--link|--probe-link"):
        probe_links([text], ["alpha", "beta"])


def test_a_site_that_is_not_there() -> None:
    with pytest.raises(UserError, match="--probe alpa: must be one of alpha, beta .did you mean 'alpha'"):
        probe_steps("demo.toml", ["alpa"], ["alpha", "beta"], [])


@pytest.mark.slow
def test_steps_are_trained_and_measured(write: Callable) -> None:  # noqa: F811
    found = probe_steps(write(GOOD), ["beta"], ["alpha", "beta"], [])
    assert 0 < found["beta"].low <= found["beta"].likely <= found["beta"].high < 60


@pytest.mark.slow
def test_training_that_fails_is_told(write: Callable) -> None:  # noqa: F811
    with pytest.raises(RunError, match="--probe beta: training some steps failed: .*local_batch_size"):
        probe_steps(write(GOOD), ["beta"], ["alpha", "beta"], ["--training.local_batch_size=0"])
