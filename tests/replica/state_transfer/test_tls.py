"""Certificates on both ends of a transfer, and the settings that name them."""

import socket
import ssl
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from shutil import which
from urllib.parse import urlsplit

import pytest
import torch

from tests.replica.state_transfer.states import STATE, assert_same
from titan_ext.errors import UserError
from titan_ext.replica import ReplicaConfig
from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.replica.state_transfer.fetch import fetch_state
from titan_ext.replica.state_transfer.tls import load_tls
from titan_ext.replica.state_transfer.transport import StateTransport

TIMEOUT = timedelta(seconds=20)

_NEW_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1"

needs_openssl = pytest.mark.skipif(which("openssl") is None, reason="the openssl command makes the certificates")


@dataclass
class Authority:
    """A certificate authority in a folder of its own."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.certificate = str(self.folder / "authority.pem")
        _openssl(
            *f"req -x509 -nodes {_NEW_KEY} -days 2 -subj /CN={self.folder.name}".split(),
            "-keyout", self._key, "-out", self.certificate,
        )  # fmt: skip

    @property
    def _key(self) -> str:
        return str(self.folder / "authority.key")

    def files(self, name: str, alternative: str) -> tuple[str, str, str]:
        """Certificate, key and authority of a site."""
        certificate, key, request, extensions = (
            str(self.folder / f"{name}.{end}") for end in ("pem", "key", "csr", "ext")
        )
        Path(extensions).write_text(f"subjectAltName={alternative}\nextendedKeyUsage=serverAuth,clientAuth\n")
        _openssl(
            *f"req -new -nodes {_NEW_KEY} -subj /CN={name}".split(),
            "-keyout", key, "-out", request,
        )  # fmt: skip
        _openssl(
            *"x509 -req -CAcreateserial -days 2".split(),
            "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-extfile", extensions, "-out", certificate,
        )  # fmt: skip
        return certificate, key, self.certificate


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@dataclass
class Sites:
    ours: tuple[str, str, str]
    theirs: tuple[str, str, str]
    elsewhere: tuple[str, str, str]
    numeric: tuple[str, str, str]


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> Sites:
    folder = tmp_path_factory.mktemp("tls")
    authority, other = Authority(folder / "ours"), Authority(folder / "theirs")
    return Sites(
        ours=authority.files("site", "DNS:localhost"),
        theirs=other.files("site", "DNS:localhost"),
        elsewhere=authority.files("elsewhere", "DNS:elsewhere.example"),
        numeric=authority.files("numeric", "IP:127.0.0.1"),
    )


@contextmanager
def serving(files: tuple[str, str, str], hostname: str = "localhost", secret: Secret | None = None):
    donor = StateTransport(hostname, 0, TIMEOUT, tls=load_tls(*files), secret=secret, chunk_bytes=100)
    try:
        donor.send_checkpoint([1], step=7, state_dict=STATE, timeout=TIMEOUT)
        yield donor.metadata()
        donor.disallow_checkpoint()
    finally:
        donor.shutdown()


def client(certificate: tuple[str, str, str] | None, authority: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority)
    if certificate is not None:
        context.load_cert_chain(*certificate[:2])
    return context


@needs_openssl
def test_sites_of_one_authority(sites):
    with serving(sites.ours) as url:
        assert url.startswith("https://localhost:")
        receiver = StateTransport("localhost", 0, TIMEOUT, tls=load_tls(*sites.elsewhere), streams=3)
        try:
            assert_same(receiver.recv_checkpoint(0, url, step=7, timeout=TIMEOUT), STATE)
        finally:
            receiver.shutdown()


@needs_openssl
def test_with_a_secret_too(sites):
    secret, context = Secret(b"the secret of this run"), load_tls(*sites.ours).client
    with serving(sites.ours, secret=secret) as url:
        assert_same(fetch_state(url, 7, timeout=20, streams=3, context=context, secret=secret), STATE)
        with pytest.raises(OSError, match="403"):
            fetch_state(url, 7, timeout=20, context=context)


@needs_openssl
def test_certificate_for_a_numeric_address(sites):
    with serving(sites.numeric, "127.0.0.1") as url:
        assert_same(fetch_state(url, 7, timeout=20, context=load_tls(*sites.ours).client), STATE)


@needs_openssl
@pytest.mark.parametrize("certificate", [None, "theirs"])
def test_client_without_our_certificate_is_refused(sites, certificate):
    stranger = client(certificate and getattr(sites, certificate), sites.ours[2])
    with serving(sites.ours) as url:
        with pytest.raises(OSError):
            fetch_state(url, 7, timeout=3, context=stranger)
        assert_same(fetch_state(url, 7, timeout=20, context=load_tls(*sites.ours).client), STATE)


@needs_openssl
@pytest.mark.parametrize(
    "files, hostname", [("theirs", "localhost"), ("elsewhere", "localhost"), ("ours", "127.0.0.1")]
)
def test_member_of_another_authority_or_name_is_refused(sites, files, hostname):
    with serving(getattr(sites, files), hostname) as url:
        with pytest.raises(ssl.SSLCertVerificationError):
            fetch_state(url, 7, timeout=20, context=load_tls(*sites.ours).client)


@needs_openssl
def test_plain_and_encrypted_do_not_meet(sites):
    with serving(sites.ours) as url:
        with pytest.raises(ValueError, match="tls_certificate"):
            fetch_state(url, 7, timeout=5)
        with pytest.raises(OSError):
            fetch_state(url.replace("https", "http"), 7, timeout=1)
    with pytest.raises(ValueError, match="tls_certificate"):
        fetch_state("http://localhost:1/state/", 7, timeout=5, context=load_tls(*sites.ours).client)


@needs_openssl
def test_slow_handshake_is_cut_and_keeps_nobody_waiting(sites):
    donor = StateTransport("localhost", 0, timedelta(seconds=1), tls=load_tls(*sites.ours))
    try:
        donor.send_checkpoint([1], step=7, state_dict=STATE, timeout=TIMEOUT)
        with socket.create_connection(("localhost", urlsplit(donor.metadata()).port), timeout=20) as slow:
            slow.sendall(b"\x16\x03\x01")
            assert_same(fetch_state(donor.metadata(), 7, timeout=20, context=load_tls(*sites.ours).client), STATE)
            try:
                assert slow.recv(1) == b""
            except ConnectionResetError:
                pass
    finally:
        donor.shutdown()


@needs_openssl
def test_slow_reader_is_cut_before_tensors_change(sites):
    tensor = torch.zeros(2**25, dtype=torch.uint8)
    donor = StateTransport("localhost", 0, timedelta(seconds=1), tls=load_tls(*sites.ours), chunk_bytes=2**26)
    try:
        donor.send_checkpoint([1], step=7, state_dict={"w": tensor}, timeout=TIMEOUT)
        plain = socket.create_connection(("localhost", urlsplit(donor.metadata()).port), timeout=20)
        with load_tls(*sites.ours).client.wrap_socket(plain, server_hostname="localhost") as reader:
            reader.sendall(b"GET /state/7/0-0 HTTP/1.1\r\n\r\n")
            received = reader.recv(4096)
            assert b"200 OK" in received
            donor.disallow_checkpoint()
            tensor.fill_(0xEE)
            try:
                while data := reader.recv(2**20):
                    received += data
            except OSError:
                pass  # cut in the middle of a record
        assert len(received) < tensor.numel()
        assert b"\xee" not in received
    finally:
        donor.shutdown()


@needs_openssl
def test_files_that_do_not_fit(sites, tmp_path):
    certificate, key, authority = sites.ours
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    locked = tmp_path / "locked.key"
    _openssl("ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", str(locked))
    for files, named in [
        ((certificate, sites.theirs[1], authority), "tls_key"),
        ((certificate, str(locked), authority), "tls_key"),
        ((str(junk), key, authority), "tls_certificate"),
        ((certificate, key, str(junk)), "tls_authority"),
    ]:
        with pytest.raises(UserError, match=named):
            load_tls(*files)


def test_settings_are_all_or_none(tmp_path):
    paths = {}
    for key in ("tls_certificate", "tls_key", "tls_authority"):
        paths[key] = str(tmp_path / key)
        Path(paths[key]).touch()
    ReplicaConfig().validate()
    ReplicaConfig(**paths).validate()
    for key in paths:
        with pytest.raises(ValueError, match=f"^{key} = None: must be set with"):
            ReplicaConfig(**paths | {key: None}).validate()
