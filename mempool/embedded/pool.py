"""Composition root of the embedded pool: engines by number, a controller over them, a ``Pool`` in front."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mempool.client import Pool
from mempool.client.counts import shard_count
from mempool.client.opening.connection import checked_timeout
from mempool.controller import Controller
from mempool.errors import ConfigError, ShardUnavailable
from mempool.types import ShardHost, ShardInfo
from mempool.types.running import TRAINER_LEASE_S
from mempool.wire.channels.loop import run

if TYPE_CHECKING:
    from mempool.shard import Engine

_START_TIMEOUT_S = 120.0


class EngineLauncher:
    """Starts shards as engines of this process. Also dials them: the engine is its own ``ShardHost``."""

    def __init__(self, *, device: str, pool: str) -> None:
        self._device = device
        self._pool = pool
        self._engines: dict[int, Engine] = {}
        self._started = 0

    async def start(self, shard: int) -> ShardInfo:
        """A new engine."""
        from mempool.shard import Engine  # loads numba or triton, which a trainer that only connects must not

        self._started += 1
        info = ShardInfo(shard=shard, address="", incarnation=self._started)
        self._engines[shard] = Engine(
            info,
            device=self._device,
            peers=self.dial,
            pool=self._pool,
            held_lease_s=TRAINER_LEASE_S,
            configured=False,
        )
        return info

    async def require_room(self, shards: int) -> None:
        """There is room for as many engines as anybody asks for."""

    async def starting(self) -> str:
        """Engines start at once."""
        return ""

    async def keep_wanted(self, shards: int) -> None:
        """The controller is gone with the pool: nobody will ask."""

    async def stop(self, info: ShardInfo) -> None:
        engine = self._engines.pop(info.shard, None)
        if engine is not None:
            await engine.close()

    def doing(self, shard: int) -> str:
        """What a shard is at just now, for messages; "" for nothing."""
        engine = self._engines.get(shard)
        return "" if engine is None else engine.doing

    def dial(self, info: ShardInfo) -> ShardHost:
        """Raises ShardUnavailable for a shard that a rescale took away; the router then follows the new view."""
        try:
            return self._engines[info.shard]
        except KeyError:
            raise ShardUnavailable(
                f"shard {info.shard} of this embedded pool is gone (rescaled away, or the pool was closed)",
                shard=info.shard,
            ) from None


def local(*, shards: int = 1, device: str = "auto", name: str = "local", timeout_s: float = 30.0) -> Pool:
    """An embedded pool: no network, no Ray, gone with the process. Close it, or use it with ``with``.

    Args:
        shards: How many shards (engines, one thread each); ``pool.rescale`` changes it.
        device: "cpu", "cuda", "cuda:1", or "auto": CUDA where there is any.
        timeout_s: Deadline of each call, seconds. A shard that is at work when it is over, as with kernels that are
            compiled at their first use, has ten minutes.

    Raises:
        ConfigError: The server packages are not installed, or there is no such device.

    Example:
        >>> import mempool, torch
        >>> with mempool.local(shards=2) as pool:
        ...     table = pool.create_table(mempool.TableConfig(name="facts", num_slots=1024, value_dim=64))
        ...     table.gather(torch.tensor([[1, 2, 3]]), torch.ones(1, 3)).shape
        torch.Size([1, 64])
    """
    count, timeout_s = shard_count(shards), checked_timeout(timeout_s)
    _require_server_packages()
    launcher = EngineLauncher(device=_device(device), pool=name)
    controller = Controller(name, launcher=launcher, dial=launcher.dial, trainer_lease_s=TRAINER_LEASE_S)
    run(controller.open(count), timeout_s=_START_TIMEOUT_S)
    return Pool(controller, dial=launcher.dial, name=name, embedded=True, doing=launcher.doing, timeout_s=timeout_s)


def _require_server_packages() -> None:
    try:
        import numba  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"mempool.local() runs shards in this process and needs the server packages ({error}); "
            "install them: pip install 'mempool[server]'"
        ) from None


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
