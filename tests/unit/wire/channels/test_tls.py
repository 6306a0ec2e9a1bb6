"""Encrypted connections: a call goes through to who shows the right certificate, and to nobody else."""

from pathlib import Path

import pytest
from certificates import Certificates
from serving import served_pool

from mempool.errors import InvalidRequest, PoolUnreachable
from mempool.wire import methods
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.loop import run
from mempool.wire.channels.tls import ClientTls, ServerTls, client_tls

CALL_S = 20.0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("strangers"))


def server_tls(certificates: Certificates) -> ServerTls:
    return ServerTls(certificate=certificates.certificate.read_bytes(), key=certificates.key.read_bytes())


def test_only_who_knows_the_authority_gets_through(certificates: Certificates, strangers: Certificates) -> None:
    authority = certificates.authority.read_bytes()
    good = ClientTls(authority=authority)
    by_name = ClientTls(authority=authority, server_name="pool.test")
    others = (
        ClientTls(authority=strangers.authority.read_bytes()),
        ClientTls(authority=authority, server_name="another.test"),
        None,
    )

    async def main() -> None:
        async with served_pool(1, token="sesame", tls=(server_tls(certificates), good)) as pool:
            for tls in (good, by_name):
                async with GrpcChannel(pool.address, token="sesame", tls=tls) as channel:
                    status = await channel.call(methods.GET_STATUS, None, timeout_s=CALL_S)
                    # The controller asked its shard over an encrypted connection too.
                    assert [shard.state for shard in status.shards] == ["ready"]
            for wrong in others:
                async with GrpcChannel(pool.address, token="sesame", tls=wrong) as channel:
                    with pytest.raises(PoolUnreachable):
                        await channel.call(methods.GET_STATUS, None, timeout_s=CALL_S)

    run(main(), 3 * CALL_S)


def test_a_client_says_it_by_a_file_or_the_environment(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMPOOL_TLS_AUTHORITY", raising=False)
    expected = ClientTls(authority=certificates.authority.read_bytes())
    assert client_tls(None) is None
    assert client_tls(expected) is expected
    assert client_tls(certificates.authority) == expected
    assert client_tls(str(certificates.authority)) == expected
    monkeypatch.setenv("MEMPOOL_TLS_AUTHORITY", str(certificates.authority))
    assert client_tls(None) == expected
    monkeypatch.setenv("MEMPOOL_TLS_SERVER_NAME", "pool.test")
    assert client_tls(None) == ClientTls(authority=expected.authority, server_name="pool.test")


def test_a_file_without_a_certificate_is_refused(certificates: Certificates, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot be read \(No such file or directory\)"):
        client_tls(tmp_path / "nowhere.pem")
    with pytest.raises(InvalidRequest, match="holds no certificate in PEM"):
        client_tls(certificates.key)


def test_a_private_key_is_never_shown(certificates: Certificates) -> None:
    shown = repr(server_tls(certificates))
    assert "PRIVATE" not in shown
    assert "key" not in shown
