"""What the doctor says of a site's lighthouse and secret, where they are no good."""

import json
from pathlib import Path

import pytest

from tests.config.conftest import GOOD
from titan_ext import cli
from titan_ext.config.load import load_site
from titan_ext.doctor.examine import brief, examine_links
from titan_ext.doctor.finding import Level


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize(
    ("flags", "level", "what"),
    [
        ([], Level.NOTE, "is not set"),
        (["--replica.lighthouse", "gibberish"], Level.PROBLEM, 'replica.lighthouse = "gibberish": must be host:port'),
        (["--replica.lighthouse", "http://127.0.0.1:1"], Level.PROBLEM, "http://127.0.0.1:1 does not answer"),
    ],
)
def test_a_lighthouse_that_is_none(
    flags: list[str], level: Level, what: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    found = examine_links(load_site(file, "alpha", flags, needs=()), str(file), 0.0).findings
    (told,) = [each for each in found if each.check == "lighthouse"]
    assert told.level is level and what in told.what and told.why and told.mend


@pytest.mark.parametrize("named", ["gibberish", "http://127.0.0.1:1"])
def test_a_lighthouse_that_is_none_is_told_without_a_site_too(
    named: str, file: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["doctor", str(file), "--lighthouse", named, "--json"]) == 1
    for site in json.loads(capsys.readouterr().out)["sites"]:
        (told,) = [each for each in site["findings"] if each["check"] == "lighthouse"]
        assert told["level"] == "problem" and named in told["what"]


def test_a_secret_that_cannot_be_read_is_a_problem(file: Path, tmp_path: Path) -> None:
    def secret(path: Path) -> Level:
        site = load_site(file, "alpha", ["--replica.secret_file", str(path)], needs=())
        return next(each.level for each in brief(site) if each.check == "secret")

    own = tmp_path / "secret"
    own.write_text("0123456789abcdef0123456789abcdef")
    own.chmod(0o600)
    assert secret(own) is Level.OK and secret(tmp_path / "absent") is Level.PROBLEM
