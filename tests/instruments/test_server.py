"""What other machines see of a site: its files, and nothing without the secret."""

import http.client
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.instruments.lines import append, step, trained
from titan_ext.errors import UserError
from titan_ext.instruments.places import LocalSites
from titan_ext.instruments.reader import RunReader
from titan_ext.instruments.remote import RemoteSites
from titan_ext.instruments.run import Run
from titan_ext.instruments.server import RunServer, Served
from titan_ext.instruments.serving import ServedSite, serving
from titan_ext.launcher.placement import free_port
from titan_ext.replica.membership.shared_secret import Secret

SECRET, OTHER = Secret(b"a secret of the run's sites"), Secret(b"the secret of other sites")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("east", "west"):
        trained(tmp_path, name, (1, 2), ("east", "west"))
    (tmp_path / "east" / "config.json").write_text('{"semi_sync": {"sync_every": 10}}')
    (tmp_path / "east" / "private.txt").write_text("not for others")
    return tmp_path


@pytest.fixture(params=[None, SECRET], ids=["open", "secret"])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[RunServer]:
    running = RunServer("127.0.0.1", 0, Served(LocalSites([folder]).sites), request.param)
    yield running
    running.stop()


def reader(server: RunServer, secret: Secret | None) -> RunReader:
    return RunReader("run", [RemoteSites(f"http://127.0.0.1:{server.port}", secret)])


def view(reader: RunReader) -> Run:
    reader.refresh()
    return reader.view(lambda run: run)


def test_a_site_behind_a_server_is_read_as_one_of_this_machine(server: RunServer, folder: Path) -> None:
    remote, local = reader(server, server.secret), RunReader("run", [LocalSites([folder])])
    for _ in range(3):
        here, there = view(local), view(remote)
        assert not remote.problems
        for name in ("east", "west"):
            assert there.timeline(name) == here.timeline(name)
            ours, theirs = here.sites[name], there.sites[name]
            assert (theirs.curve.points(), theirs.rounds, theirs.commits) == (
                ours.curve.points(),
                ours.rounds,
                ours.commits,
            )
            assert theirs.config == ours.config and theirs.disk["total"] == ours.disk["total"]
        append(folder / "east" / "metrics.jsonl", step(here.sites["east"].last.step + 1, 100.0))
    (folder / "east" / "metrics.jsonl").write_text(json.dumps(step(1, 200.0)) + "\n")
    assert view(remote).sites["east"].last.time == 200.0


@pytest.mark.parametrize("secret", [None, OTHER], ids=["none", "another"])
def test_nothing_is_served_without_the_secret(folder: Path, secret: Secret | None) -> None:
    server = RunServer("127.0.0.1", 0, Served(LocalSites([folder]).sites), SECRET)
    try:
        stranger = reader(server, secret)
        assert view(stranger).names == []
        (problem,) = stranger.problems
        assert "secret" in problem
        for path in ("/", "/sites", "/sites/east/metrics.jsonl", "/metrics", "/events"):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("GET", path)
            assert connection.getresponse().status == 403
            connection.close()
    finally:
        server.stop()


def test_a_server_that_does_not_hold_the_secret_is_not_believed(folder: Path) -> None:
    for held in (None, OTHER):
        server = RunServer("127.0.0.1", 0, Served(LocalSites([folder]).sites), held)
        try:
            client = reader(server, SECRET)
            assert view(client).names == [] and "secret" in client.problems[0]
        finally:
            server.stop()


@pytest.mark.parametrize(
    "path",
    ["/sites/east/private.txt", "/sites/../east/config.json", "/sites/%2e%2e/config.json", "/sites/north/config.json"],
)
def test_only_the_files_of_sites_are_served(folder: Path, path: str) -> None:
    server = RunServer("127.0.0.1", 0, Served(LocalSites([folder]).sites))
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", path)
        assert connection.getresponse().status == 404
        connection.close()
    finally:
        server.stop()


def test_a_server_that_goes_and_comes_back(folder: Path) -> None:
    port = free_port()
    client = RunReader("run", [RemoteSites(f"http://127.0.0.1:{port}", None)])
    assert view(client).names == [] and str(port) in client.problems[0]
    for number in (21, 22):
        append(folder / "east" / "metrics.jsonl", step(number, float(number)))
        server = RunServer("127.0.0.1", port, Served(LocalSites([folder]).sites))
        assert view(client).sites["east"].last.step == number and not client.problems
        server.stop()
        east = view(client).sites["east"]
        assert east.last.step == number and client.problems and str(port) in east.problem


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, b"<html>hello</html>", "no titan_ext site"),
        (200, b'{"east": {"disk": "full"}}', "no titan_ext site"),
        (200, b'["east"]', "no titan_ext site"),
        (502, b"<html>\n<h1>Bad gateway</h1>\n</html>", "answers with status 502: <html>"),
        (500, b"", "answers with status 500"),
    ],
)
def test_something_else_that_answers_is_told_as_such(status: int, body: bytes, told: str) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    other = HTTPServer(("127.0.0.1", 0), Page)
    Thread(target=other.serve_forever, daemon=True).start()
    client = RunReader("run", [RemoteSites(f"http://127.0.0.1:{other.server_address[1]}", None)])
    assert view(client).names == [] and told in client.problems[0] and "\n" not in client.problems[0]
    other.shutdown()
    other.server_close()


def test_the_launcher_serves_sites_of_one_port_together(folder: Path) -> None:
    port = free_port()
    sites = [
        ServedSite(name=name, folder=folder / name, host="127.0.0.1", port=port, secret_file=None)
        for name in ("east", "west")
    ]
    with serving(sites) as lines:
        assert lines == [f"metrics of east, west on port {port}: titan-ext watch http://HOST:{port}"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/sites") as answer:
            assert set(json.load(answer)) == {"east", "west"}
        with pytest.raises(UserError, match=f"metrics.serve_port = {port}: cannot listen there"):
            with serving(sites[:1]):
                pass
