"""What a pool's processes know each other by and keep from others: it is in no file, record, status or log.

Ray hands it to the actors.
"""

import secrets
from dataclasses import dataclass, field

from mempool.config import ClusterConfig, TlsConfig
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.tls import ClientTls, ServerTls


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolKeys:
    """The secrets of one pool, the same for all its processes and all their starts.

    Attributes:
        token: What every call must carry; trainers have it too. None on loopback.
        controller_key: What calls of the controller, and between shards, must carry beside it. No client ever has it.
        server_tls: Who its servers are; None: connections are not encrypted.
        client_tls: How its processes, and commands, know them.
    """

    token: str | None = field(repr=False)
    controller_key: str = field(repr=False)
    server_tls: ServerTls | None = None
    client_tls: ClientTls | None = None

    @classmethod
    def of(cls, config: ClusterConfig) -> "PoolKeys":
        """The keys of a pool that is about to start: a new controller key, the rest as the configuration says.

        Raises:
            ConfigError: A file of pool.token_file or pool.tls cannot be read, or does not hold what it should.
        """
        tls = config.pool.tls
        certificate = None if tls is None else ServerTls(certificate=tls.read("certificate"), key=tls.read("key"))
        return cls(
            token=config.pool.token(),
            controller_key=secrets.token_hex(32),
            server_tls=certificate,
            client_tls=client_tls_of(config.pool.tls),
        )

    def channels(self) -> GrpcChannels:
        """Connections of the pool's own processes."""
        return GrpcChannels(token=self.token, controller_key=self.controller_key, tls=self.client_tls)


def client_tls_of(tls: TlsConfig | None) -> ClientTls | None:
    """How commands know the servers of a pool. Raises ConfigError where the authority's file cannot be read."""
    return None if tls is None else ClientTls(authority=tls.read("authority"), server_name=tls.server_name)
