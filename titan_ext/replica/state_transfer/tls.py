"""TLS between sites with certificates on both ends."""

import ssl
from dataclasses import dataclass

from titan_ext.errors import UserError


@dataclass(frozen=True)
class Tls:
    """The two ends of a site's connections.

    Args:
        server: for connections accepted; demands a certificate signed by the authority.
        client: for connections made; verifies the certificate and that it is for the host called.
    """

    server: ssl.SSLContext
    client: ssl.SSLContext


def load_tls(certificate: str, key: str, authority: str) -> Tls:
    """TLS 1.3 with the site's certificate; peers need one that the authority has signed.

    Args:
        certificate: PEM file of the site's certificate, followed by those between it and the authority.
        key: PEM file of its private key, without a passphrase.
        authority: PEM file of the authority's certificates.

    Raises:
        UserError: a file cannot be read, or is no PEM file of its kind.
    """
    ends = (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    for context in ends:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            # A password is given so that a key which needs one fails instead of asking the terminal.
            context.load_cert_chain(certificate, key, password="none")
        except (OSError, ValueError) as error:
            raise UserError(
                f'replica.tls_certificate = "{certificate}": must be a PEM certificate that belongs to '
                f'replica.tls_key = "{key}", a PEM key without passphrase ({error})'
            ) from error
        try:
            context.load_verify_locations(cafile=authority)
        except (OSError, ValueError) as error:
            raise UserError(
                f'replica.tls_authority = "{authority}": must be a PEM file of certificates ({error})'
            ) from error
    return Tls(*ends)
