"""A pool's keys: drawn anew for each pool, read from the files that the configuration names, never shown."""

import pickle
from pathlib import Path

import pytest
from certificates import Certificates

from mempool.config import ClusterConfig, PoolConfig, TlsConfig
from mempool.errors import ConfigError
from mempool.rayhost.keys import PoolKeys, client_tls_of


def config(**pool: object) -> ClusterConfig:
    return ClusterConfig(pool=PoolConfig(name="kept", shards=1, **pool))


def test_each_pool_has_a_controller_key_of_its_own_even_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMPOOL_TOKEN", raising=False)
    first, second = PoolKeys.of(config()), PoolKeys.of(config())
    assert first.token is None
    assert len(first.controller_key) == 64
    assert first.controller_key != second.controller_key
    assert pickle.loads(pickle.dumps(first)) == first  # as Ray hands it over


def test_files_are_read_where_commands_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPOOL_TOKEN", "sesame")
    files = Certificates(tmp_path)
    tls = TlsConfig(certificate=files.certificate, key=files.key, authority=files.authority, server_name="pool.test")
    keys = PoolKeys.of(config(tls=tls))
    assert keys.server_tls is not None
    assert keys.server_tls.certificate == files.certificate.read_bytes()
    assert keys.server_tls.key == files.key.read_bytes()
    assert keys.client_tls == client_tls_of(tls)
    assert keys.client_tls is not None
    assert keys.client_tls.server_name == "pool.test"
    channels = keys.channels()
    assert (channels.token, channels.controller_key, channels.tls) == ("sesame", keys.controller_key, keys.client_tls)
    for shown in (repr(keys), repr(channels)):
        assert "sesame" not in shown
        assert keys.controller_key not in shown
        assert "PRIVATE" not in shown


@pytest.mark.parametrize("name", ["certificate", "key", "authority"])
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str) -> None:
    files = Certificates(tmp_path)
    paths = {"certificate": files.certificate, "key": files.key, "authority": files.authority}
    with pytest.raises(ConfigError, match=rf"pool\.tls\.{name} .* cannot be read \(No such file"):
        PoolKeys.of(config(tls=TlsConfig(**paths | {name: tmp_path / "nowhere"})))
    (tmp_path / "empty").write_text("nothing")
    with pytest.raises(ConfigError, match=rf"pool\.tls\.{name} .* holds no {name} in PEM"):
        PoolKeys.of(config(tls=TlsConfig(**paths | {name: tmp_path / "empty"})))
