"""What either side of an encrypted connection needs, as bytes of PEM. Leaves a pool's files to the config."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from mempool.config import TLS_NAME_VARIABLE, TLS_VARIABLE
from mempool.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """How a client knows the pool's servers.

    Attributes:
        authority: PEM certificates of who may sign theirs; None: whom this system trusts.
        server_name: The name their certificates carry; None: the host of each address.
    """

    authority: bytes | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel."""
        return grpc.ssl_channel_credentials(root_certificates=self.authority)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """How a server shows who it is.

    Attributes:
        certificate: PEM, its own first, then those that lead to the authority.
        key: PEM, the private key of the first. A secret: never shown.
    """

    certificate: bytes
    key: bytes = field(repr=False)

    def credentials(self) -> grpc.ServerCredentials:
        """For a port."""
        return grpc.ssl_server_credentials([(self.key, self.certificate)])


def client_tls(source: ClientTls | Path | str | None) -> ClientTls | None:
    """What a user says of encryption: the file with the authority's certificate; None takes the environment's, if set.

    MEMPOOL_TLS_SERVER_NAME is the name that the servers' certificates are for, where it is not their addresses.

    Raises:
        InvalidRequest: There is no certificate in that file.
    """
    source = os.environ.get(TLS_VARIABLE) or None if source is None else source
    if source is None or isinstance(source, ClientTls):
        return source
    path = Path(source).expanduser()
    try:
        authority = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"the certificate of the pool's authority, {str(path)!r}, cannot be read ({error.strerror}); check tls=... "
            f"and {TLS_VARIABLE}"
        ) from None
    if b"BEGIN CERTIFICATE" not in authority:
        raise InvalidRequest(f"{str(path)!r} holds no certificate in PEM; give the file of pool.tls.authority")
    return ClientTls(authority=authority, server_name=os.environ.get(TLS_NAME_VARIABLE) or None)
