"""The file of the shared secret, and shared state between sites that hold one."""

import http.client
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
import torch

from tests.replica.state_transfer.faults import Line, always, answer, listening
from tests.replica.state_transfer.states import STATE, assert_same
from tests.replica.state_transfer.test_fetch import CHUNK, MARK, marked_state
from tests.replica.state_transfer.test_state_format import encoded
from titan_ext.errors import UserError
from titan_ext.replica.membership.shared_secret import Secret, load_secret
from titan_ext.replica.state_transfer.chunks import MessageInfo, chunk_digest
from titan_ext.replica.state_transfer.fetch import fetch_state
from titan_ext.replica.state_transfer.transport import StateTransport

OURS, THEIRS = Secret(b"the secret of this run"), Secret(b"the secret of another")
TIMEOUT = timedelta(seconds=20)
REFUSED = "is refused: it does not hold this site's secret"


@contextmanager
def serving(secret: Secret | None, state: dict = STATE, **options):
    donor = StateTransport("127.0.0.1", 0, TIMEOUT, secret=secret, **options)
    try:
        donor.send_checkpoint([1], step=7, state_dict=state, timeout=TIMEOUT)
        yield donor.metadata()
        donor.disallow_checkpoint()
    finally:
        donor.shutdown()


class Connection:
    """A connection on which every request goes out as it is given."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)

    def ask(self, **headers: str) -> tuple[int, dict[str, str], bytes]:
        self._connection.request(
            "GET", "/state/7/0-0", headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        response = self._connection.getresponse()
        return response.status, dict(response.headers), response.read()


@pytest.mark.parametrize("streams", [1, 3])
def test_between_holders(streams):
    with serving(OURS, chunk_bytes=64) as url:
        assert_same(fetch_state(url, 7, timeout=20, streams=streams, secret=OURS), STATE)


@pytest.mark.parametrize("secret", [None, THEIRS], ids=["none", "another"])
def test_client_without_the_secret_is_told_so_and_named_in_the_log(secret, caplog):
    with serving(OURS) as url:
        with pytest.raises(OSError, match="403: .*replica.secret_file"):
            fetch_state(url, 7, timeout=20, secret=secret)
        assert REFUSED in caplog.text
        assert_same(fetch_state(url, 7, timeout=20, secret=OURS), STATE)


@pytest.mark.parametrize("secret", [None, THEIRS], ids=["none", "another"])
def test_state_of_a_member_without_the_secret_is_not_read(secret):
    with serving(secret) as url:
        with pytest.raises(OSError, match="replica.secret_file"):
            fetch_state(url, 7, timeout=20, secret=OURS)


def test_no_byte_of_state_before_the_proof():
    state = {"w": torch.full((4096,), 0x77, dtype=torch.uint8)}
    with serving(OURS, state) as url:
        for headers in [{}, {"X_Proof": "0" * 64}, {"X_Nonce": "0" * 32}, {"X_Nonce": "", "X_Proof": ""}]:
            status, answered, body = Connection(url).ask(**headers)
            assert status in (401, 403)
            assert b"w" * 8 not in body
            assert "X-State-Bytes" not in answered and "ETag" not in answered


def test_replayed_proof_is_refused():
    with serving(OURS) as url:
        line = Line(url, lambda number, seen, data: data)
        with listening(line.serve) as tapped:
            assert_same(fetch_state(tapped, 7, timeout=20, streams=1, secret=OURS), STATE)
        nonce, proof = (header_of(bytes(line.requests), name) for name in ("X-Nonce", "X-Proof"))
        again = Connection(url)
        assert again.ask(X_Nonce=nonce)[0] == 401
        assert again.ask(X_Proof=proof)[0] == 403


def header_of(data: bytes, name: str) -> str:
    return data.split(f"{name}: ".encode())[1].split(b"\r\n")[0].decode()


def test_bytes_swapped_on_the_way_with_a_fitting_plain_digest_are_refused():
    """A line that also changes the digest cannot make one without the connection's key."""
    lies = []

    def tamper(number, seen, data):
        if MARK * 2 in data:
            lies.append(number)
        return data.replace(MARK * 2, b"\xaa" * 2)

    with serving(OURS, marked_state(), chunk_bytes=CHUNK) as url, listening(Line(url, tamper).serve) as spoilt:
        with pytest.raises(ValueError, match="chunk 3.*wrong digest"):
            fetch_state(spoilt, 7, timeout=20, secret=OURS)
    assert lies


def test_chunks_have_places():
    """The digest of a chunk is none of another chunk, offer, step or connection."""
    one, other = (MessageInfo(f'"{digit * 32}"', 100, 10) for digit in "01")
    places = [(b"k" * 32, 7, one, 0), (b"k" * 32, 7, one, 1), (b"k" * 32, 8, one, 0), (b"k" * 32, 7, other, 0)]
    places.append((b"l" * 32, 7, one, 0))
    assert len({chunk_digest(*place).digest() for place in places}) == len(places)


def test_member_that_answers_at_once_is_refused():
    with listening(always(answer(encoded(STATE)))) as url:
        with pytest.raises(OSError, match="does not prove"):
            fetch_state(url, 7, timeout=20, secret=OURS)


def test_member_that_makes_up_a_proof_is_refused():
    challenge = b"HTTP/1.1 401 Unauthorized\r\nX-Nonce: 00\r\nContent-Length: 0\r\n\r\n"
    answers = iter([challenge, answer(encoded(STATE), X_Proof="0" * 64)])

    def serve(connection, number):
        while connection.recv(65536):
            connection.sendall(next(answers))

    with listening(serve) as url:
        with pytest.raises(OSError, match="does not prove"):
            fetch_state(url, 7, timeout=20, secret=OURS)


def secret_file(folder, content: bytes, mode: int = 0o600) -> str:
    path = folder / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_white_space_around_the_secret_does_not_count(tmp_path):
    assert load_secret(None) is None
    one = load_secret(secret_file(tmp_path, b"0123456789abcdef"))
    assert one.proves(load_secret(secret_file(tmp_path, b"0123456789abcdef\r\n")).proof("x", "y"), "x", "y")
    assert not one.proves(load_secret(secret_file(tmp_path, b"0123456789abcdeF")).proof("x", "y"), "x", "y")
    assert "0123456789abcdef" not in repr(one)


@pytest.mark.parametrize(
    "content, mode, said",
    [
        (b"0123456789abcde\n", 0o600, "holds 15 bytes, must hold 16"),
        (b"0123456789abcdef", 0o640, "chmod 600"),
        (b"0123456789abcdef", 0o604, "chmod 600"),
    ],
)
def test_files_that_cannot_hold_a_secret(tmp_path, content, mode, said):
    path = secret_file(tmp_path, content, mode)
    with pytest.raises(UserError, match=f'^replica.secret_file = "{path}": .*{said}') as caught:
        load_secret(path)
    assert "01234" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="^replica.secret_file = .*No such file"):
        load_secret(str(tmp_path / "none"))


def test_words_are_not_run_together():
    assert OURS.proof("p", "ab", "c") != OURS.proof("p", "a", "bc")
    assert OURS.proof("p", "ab") != OURS.proof("pa", "b")
    assert not OURS.proves(None, "p") and not OURS.proves("é\ud800", "p")
