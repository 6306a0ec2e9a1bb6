"""Composition root of the embedded pool: engines by number, a controller over them, a ``Pool`` in front."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from mempool.client import Pool
from mempool.client.counts import shard_count
from mempool.client.opening.connection import checked_timeout
from mempool.controller import Controller
from mempool.embedded.memory import PoolFolder
from mempool.errors import ConfigError, ShardUnavailable
from mempool.observe import Stages
from mempool.types import AtOnceShard, ShardHost, ShardInfo
from mempool.types.running import TRAINER_LEASE_S, to_its_end
from mempool.wire.channels.loop import run

if TYPE_CHECKING:
    from mempool.shard import Engine
    from mempool.shard.durable.store import Store

_START_TIMEOUT_S = 120.0
_CLOSE_S = 20.0
"""So long those that are starting are waited for: they let their folders go."""


class EngineLauncher:
    """Starts shards as engines of this process. Also dials them: the engine is its own ``ShardHost``."""

    def __init__(self, *, device: str, pool: str, folder: PoolFolder | None = None) -> None:
        self._device = device
        self._pool = pool
        self._folder = folder
        self._engines: dict[int, Engine] = {}
        self._started = 0
        self._starting: set[asyncio.Task[ShardInfo]] = set()

    async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:
        """A new engine; one that has storage goes on where it was, unless it is to be fresh."""
        starting = asyncio.create_task(self._start(shard, fresh=fresh))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        return await starting

    async def _start(self, shard: int, *, fresh: bool) -> ShardInfo:
        from mempool.shard import Engine  # loads numba or triton, which a trainer that only connects must not

        stages, store = Stages(), None
        if self._folder is not None:
            with stages.measure("recover: open"):  # it reads what lies on the disk, and may wait for it
                store = await _opened(partial(self._folder.store, shard, fresh=fresh))
        self._started = max(self._started + 1, 0 if store is None else store.incarnation)
        info = ShardInfo(shard=shard, address="", incarnation=self._started)
        engine: Engine | None = None
        try:
            engine = Engine(
                info,
                device=self._device,
                peers=self.dial,
                pool=self._pool,
                held_lease_s=TRAINER_LEASE_S,
                stages=stages,
                configured=False,
                store=store,
            )
            await engine.recover()
        except BaseException:
            if engine is not None:
                await to_its_end(engine.close())
            elif store is not None:
                await to_its_end(store.close())
            raise
        self._engines[shard] = engine
        return info

    async def require_room(self, shards: int) -> None:
        """There is room for as many engines as anybody asks for."""

    async def starting(self) -> str:
        """Engines start at once."""
        return ""

    async def keep_wanted(self, shards: int) -> None:
        """Without storage the controller is gone with the pool: nobody will ask."""
        if self._folder is not None:
            await asyncio.to_thread(self._folder.keep_wanted, shards)

    async def stop(self, info: ShardInfo) -> None:
        engine = self._engines.pop(info.shard, None)
        if engine is None:
            return
        try:
            owns = any(table.is_needed for table in (await engine.status()).tables)
        except ShardUnavailable:  # its thread has ended; what it keeps stays
            owns = True
        await engine.close()
        if self._folder is not None and not owns and info.shard >= self._folder.wanted:
            await asyncio.to_thread(self._folder.remove, info.shard)

    async def close(self) -> None:
        """After the last shard: the folder is free for others."""
        if starting := set(self._starting):
            for task in starting:
                task.cancel()
            await asyncio.wait(starting, timeout=_CLOSE_S)
        engines, self._engines = self._engines, {}
        try:
            ended = await asyncio.gather(*(engine.close() for engine in engines.values()), return_exceptions=True)
        finally:
            if self._folder is not None:
                self._folder.close()
        for error in ended:
            if isinstance(error, BaseException):
                raise error

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

    def dial_at_once(self, info: ShardInfo) -> AtOnceShard | None:
        """The same for threads that wait themselves."""
        engine = self._engines.get(info.shard)
        return None if engine is None else engine.at_once


async def _opened(open_store: Callable[[], Store]) -> Store:
    """What a thread opens. Whoever gives it up has it closed: else it is locked for as long as this process lives."""
    stores: list[Store] = []
    try:
        await to_its_end(asyncio.to_thread(lambda: stores.append(open_store())))
    except BaseException:
        for store in stores:
            await to_its_end(store.close())
        raise
    return stores[0]


def local(
    path: str | os.PathLike[str] | None = None,
    *,
    shards: int | None = None,
    device: str = "auto",
    name: str = "local",
    timeout_s: float = 30.0,
) -> Pool:
    """An embedded pool: no network, no Ray. Close it, or use it with ``with``.

    Args:
        path: A folder where it is kept: opened again, after a ``kill -9`` too, it has what was acknowledged, bit for
            bit. One process at a time. None: it is gone with the process.
        shards: How many shards (engines, one thread each); ``pool.rescale`` changes it. None: 1, or as many as were
            kept.
        device: "cpu", "cuda", "cuda:1", or "auto": CUDA where there is any.
        name: The pool's name; one folder may have several pools.
        timeout_s: Deadline of each call, seconds. A shard that is at work when it is over, as with kernels that are
            compiled at their first use, has ten minutes.

    Raises:
        ConfigError: The server packages are not installed, there is no such device, the path is none, or what lies
            there has another number of shards, or is of a later version.
        StorageFailed: Nothing can be kept at the path, or another process, which is named, has that pool open.
        DataLoss: What was kept is damaged; file and offset are named.

    Example:
        >>> import mempool, torch
        >>> with mempool.local(shards=2) as pool:
        ...     table = pool.create_table(mempool.TableConfig(name="facts", num_slots=1024, value_dim=64))
        ...     table.gather(torch.tensor([[1, 2, 3]]), torch.ones(1, 3)).shape
        torch.Size([1, 64])
    """
    count, timeout_s = shard_count(1 if shards is None else shards), checked_timeout(timeout_s)
    _require_server_packages()
    chosen = _device(device)
    folder = None if path is None else PoolFolder(_absolute(path), name)
    if folder is not None and not folder.is_new and shards not in (None, folder.wanted):
        folder.close()
        raise ConfigError(
            f"the pool {name!r} at {path} has {folder.wanted} shards, and is to be opened with {shards}: leave that "
            f"out, and call pool.rescale({shards}) when it is open. Nothing was changed."
        )
    launcher = EngineLauncher(device=chosen, pool=name, folder=folder)
    controller = Controller(name, launcher=launcher, dial=launcher.dial, trainer_lease_s=TRAINER_LEASE_S)
    try:
        if folder is None or folder.is_new:
            run(_made(controller, launcher, count), timeout_s=_START_TIMEOUT_S)
        else:
            run(_found(controller, launcher, folder))  # however long it takes to read
    except BaseException:
        run(launcher.close())
        raise
    return Pool(
        controller,
        dial=launcher.dial,
        name=name,
        embedded=True,
        doing=launcher.doing,
        dial_at_once=launcher.dial_at_once,
        timeout_s=timeout_s,
        on_close=launcher.close,
    )


async def _made(controller: Controller, launcher: EngineLauncher, shards: int) -> None:
    await launcher.keep_wanted(shards)
    await controller.open(shards)


async def _found(controller: Controller, launcher: EngineLauncher, folder: PoolFolder) -> None:
    infos: list[ShardInfo] = []
    kept = folder.kept
    for shards in (kept, sorted(set(folder.shards) - set(kept))):  # nothing is made where something is amiss
        started = await asyncio.gather(*(launcher.start(shard) for shard in shards), return_exceptions=True)
        for info in started:
            if isinstance(info, BaseException):
                raise info
            infos.append(info)
    await controller.adopt(infos, wanted=folder.wanted)


def _absolute(path: object) -> str:
    """The path of a folder as a user gives it. Raises ConfigError for what is none."""
    text = path if isinstance(path, str) else os.fspath(path) if isinstance(path, os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise ConfigError(f"path={path!r:.80}: give a folder's path, or leave it out for a pool that is kept nowhere")
    return os.path.abspath(os.path.expanduser(text))


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
