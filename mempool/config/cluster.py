"""The configuration of a pool: what a cluster file says (``ClusterConfig``). Leaves reading the file to ``file``."""

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from mempool.config.amounts import ByteCount, PortRange, format_bytes
from mempool.config.model import ConfigModel, FieldProblem, Flag, Number, WholeNumber
from mempool.config.table import Name, TableConfig
from mempool.errors import ConfigError
from mempool.types import MAX_SHARDS
from mempool.types.running import TRAINER_LEASE_S

TOKEN_VARIABLE = "MEMPOOL_TOKEN"
TCP_LINES_VARIABLE = "MEMPOOL_TCP_LINES"
"""Environment variable: "0" has calls go by gRPC where they could by lines over TCP. Of shards, too."""
TLS_VARIABLE = "MEMPOOL_TLS_AUTHORITY"
TLS_NAME_VARIABLE = "MEMPOOL_TLS_SERVER_NAME"
RECORDED = "recorded"
"""Set in the validation's context for the configuration of a pool that runs already."""

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_RAY_ADDRESS = re.compile(r"(auto|local|(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):\d{1,5})")
_LEAST_CLIENT_BYTES = 64 * 2**20
_MOST_COMMIT_BYTES = 256 * 2**20
_OPTIONAL_SECTIONS = ("shard", "ray", "tables")
_RESOURCES_WITH_FIELDS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory", "object_store_memory": "memory"}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``. Names other than localhost count as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host(value: str) -> str:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        if not _HOST.fullmatch(value):
            raise ValueError(
                "is not a host name or an IP address; give the host alone, the port has its own field"
            ) from None
    return value


def _ray_address(value: str) -> str:
    if not _RAY_ADDRESS.fullmatch(value):
        raise ValueError('is not an address of Ray; give "auto", "local" or the head\'s "host:port"')
    return value


Host = Annotated[str, AfterValidator(_host)]


def _from_the_file(path: Path, info: ValidationInfo) -> Path:
    """A path relative to the cluster file, kept absolute."""
    folder = (info.context or {}).get("folder", "")
    return Path(folder, path.expanduser()).absolute()


FilePath = Annotated[Path, AfterValidator(_from_the_file)]


class TlsConfig(ConfigModel):
    """Encryption of all connections of a pool. Files of PEM, where commands are given; shards get them through Ray.

    Args:
        certificate: Shown by the controller and every shard, followed by those that lead to the authority. It must name
            every host that clients are told (``pool.advertise``, or each node's address), or ``server_name``.
        key: The certificate's private key.
        authority: The certificate of who signed it; clients get it (MEMPOOL_TLS_AUTHORITY).
        server_name: A name in the certificate that shards, commands and clients (MEMPOOL_TLS_SERVER_NAME) check instead
            of the addresses.
    """

    certificate: FilePath
    key: FilePath
    authority: FilePath
    server_name: Host | None = None

    def read(self, name: Literal["certificate", "key", "authority"]) -> bytes:
        """The bytes of one of the files. Raises ConfigError where it cannot be read, or is no PEM."""
        path: Path = getattr(self, name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"pool.tls.{name} {str(path)!r} cannot be read ({error.strerror}).") from None
        wanted = b"PRIVATE KEY-----" if name == "key" else b"BEGIN CERTIFICATE"
        if wanted not in content:
            raise ConfigError(f"pool.tls.{name} {str(path)!r} holds no {name} in PEM.")
        return content


class PoolConfig(ConfigModel):
    """The pool as a whole.

    Args:
        name: The pool's name, by which commands find it; letters, digits, ``_ . -``, a letter first, at most 63.
        shards: How many shards there shall be: the one field that a living pool follows at `mempool apply`.
        bind: The interface the controller and the shards listen on. Anything but loopback requires a token.
        advertise: The host by which clients are told of the controller and of every shard, so for a pool on one host
            alone (behind NAT, in a container); None means ``bind``, or each node's own address where ``bind`` is all
            interfaces.
        port: The controller's port, where clients attach; 0 takes a free one.
        shard_ports: First and last port that shards may take on a node; None takes free ones.
        line_ports: First and last port at which shards may take lines, the faster way for trainers on other hosts; None
            takes free ones. A trainer that does not reach them goes by gRPC. With ``tls`` there are no lines.
        token_file: A file with the token, where commands are given, relative to the cluster file (in Python: to the
            working folder) and kept absolute; shards get the token through Ray. None: MEMPOOL_TOKEN, if set.
        tls: Encrypts all connections; None: the token and all data travel in clear text.
        rescale_by: "heat": a rescale brings every shard near its share of the load, by what was read and written
            lately; "pages": near its share of the pages, whatever clients do: two runs with the same rescales have
            their pages at the same places, so the same bits.
    """

    name: Name
    shards: WholeNumber = Field(gt=0, le=MAX_SHARDS)
    bind: Host = "127.0.0.1"
    advertise: Host | None = None
    port: WholeNumber = Field(default=7077, ge=0, le=65535)
    shard_ports: PortRange = None
    line_ports: PortRange = None
    token_file: FilePath | None = None
    tls: TlsConfig | None = None
    rescale_by: Literal["heat", "pages"] = "heat"

    @model_validator(mode="after")
    def _token_and_ports(self, info: ValidationInfo) -> Self:
        recorded = (info.context or {}).get(RECORDED, False)  # of a pool that has its token: it need not be here
        if not (recorded or is_loopback(self.bind) or self.token_file or os.environ.get(TOKEN_VARIABLE)):
            raise FieldProblem(
                ("bind",),
                self.bind,
                "lets other machines in, and there is no token. Set pool.token_file or the environment variable "
                f"{TOKEN_VARIABLE}, or bind to 127.0.0.1.",
            )
        for name, ports in (("shard_ports", self.shard_ports), ("line_ports", self.line_ports)):
            if ports and ports[0] <= self.port <= ports[1]:
                raise FieldProblem(
                    ("port",), self.port, f"lies within {name} ({ports[0]}-{ports[1]}); take one outside."
                )
        if self.shard_ports and self.line_ports:
            first, last = self.shard_ports
            if self.line_ports[0] <= last and first <= self.line_ports[1]:
                raise FieldProblem(
                    ("line_ports",), self.line_ports, f"overlaps shard_ports ({first}-{last}); take others."
                )
        return self

    def token(self) -> str | None:
        """The token that every call must carry: of ``token_file``, else of MEMPOOL_TOKEN, else None.

        Raises:
            ConfigError: The file cannot be read, or the token is empty or not printable ASCII without blanks.
        """
        if self.token_file is None:
            source, text = f"the environment variable {TOKEN_VARIABLE}", os.environ.get(TOKEN_VARIABLE, "")
            if not text:
                return None
        else:
            source = f"pool.token_file {str(self.token_file)!r}"
            try:
                text = self.token_file.read_text(encoding="ascii")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "not ASCII"
                raise ConfigError(f"{source} cannot be read ({reason}). Put the token there, on one line.") from error
        token = text.strip()
        # The token travels as a header, which bears nothing else. It is a secret: it is never shown.
        if not token or not all("!" <= character <= "~" for character in token):
            raise ConfigError(f"{source} holds no token: it must be one line of printable ASCII without blanks.")
        return token


class StorageConfig(ConfigModel):
    """Where shards keep their pages, and what was committed, so that it survives them.

    Args:
        path: A folder on every node that runs shards, absolute; each shard has its own in it, and stays on its node.
            Where it is shared among nodes a lost node's shards come back elsewhere.
        journal_limit: Bytes that a shard's journal may have on the disk, about: at half of it a snapshot is begun.
        sync: "commit": what is acknowledged survives a power cut; "off": a killed process alone.
    """

    path: str
    journal_limit: ByteCount = Field(default=2**30, ge=2**20)
    sync: Literal["commit", "off"] = "commit"

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if not os.path.isabs(path) or "\0" in path:
            raise ValueError("is not an absolute path; shards on any node look there.")
        return path


class ShardConfig(ConfigModel):
    """What each shard gets. Sizes take "2GiB", "512MiB" or plain bytes.

    Args:
        device: "cpu", "cuda", or "auto": a GPU where Ray gave the shard one.
        num_gpus: GPUs Ray reserves for a shard; a fraction shares one.
        num_cpus: CPUs Ray reserves for a shard; 0 lets any number of shards on a small machine.
        threads: Threads of a shard's kernels.
        memory: What a shard may hold in all: pages (values, optimizer state and keys) get what the two below leave.
        client_memory: Of it, what clients may make the shard hold: updates that are not committed, calls that wait or
            are answered, lookups remembered for their gradients. None: a quarter, at least 64 MiB, at most half.
        context_memory: Of client_memory, what remembered lookups may have; the oldest is forgotten first. None: half.
        commit_memory: Of memory, the temporary memory of commits: a larger step is applied in parts. None: an eighth,
            at most 256 MiB.
        version_memory: Of what pages may have, what is kept for who reads versions (``table.at``, ``pool.snapshot``),
            as far as pages leave it: the oldest goes first. None: an eighth.
        trainer_lease: Seconds without a word of a trainer after which shards drop what it has not committed, and a
            rescale goes on over a step that it left undecided. A trainer says that it lives, at a third of it.
        resources: Ray's custom resources a shard asks for, to say on which nodes it may run.
        max_restarts: How often Ray starts a dead shard again; -1 is always.
        storage: Where it keeps what it has; None: a shard that dies loses its pages.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_gpus: Number = Field(default=0.0, ge=0)
    num_cpus: Number = Field(default=0.0, ge=0)
    threads: WholeNumber = Field(default=1, gt=0, le=1024)
    memory: ByteCount = Field(default=2 * 2**30, ge=2**20)
    client_memory: Annotated[ByteCount, Field(ge=2**20)] | None = None
    context_memory: Annotated[ByteCount, Field(ge=2**20)] | None = None
    commit_memory: Annotated[ByteCount, Field(ge=2**20)] | None = None
    version_memory: Annotated[ByteCount, Field(ge=0)] | None = None
    trainer_lease: Number = Field(default=TRAINER_LEASE_S, ge=1, le=600)
    resources: dict[str, Annotated[Number, Field(gt=0)]] = Field(default_factory=dict)
    max_restarts: WholeNumber = Field(default=-1, ge=-1)
    storage: StorageConfig | None = None

    @property
    def client_bytes(self) -> int:
        """What clients may make a shard hold."""
        if self.client_memory is not None:
            return self.client_memory
        return min(max(self.memory // 4, _LEAST_CLIENT_BYTES), self.memory // 2)

    @property
    def commit_bytes(self) -> int:
        """What commits may take for a while."""
        return min(self.memory // 8, _MOST_COMMIT_BYTES) if self.commit_memory is None else self.commit_memory

    @property
    def page_bytes(self) -> int:
        """What is left for pages."""
        return self.memory - self.client_bytes - self.commit_bytes

    @model_validator(mode="after")
    def _room_for_pages(self) -> Self:
        if self.page_bytes <= 0:
            raise FieldProblem(
                ("memory",),
                format_bytes(self.memory),
                f"leaves nothing for pages: client_memory takes {format_bytes(self.client_bytes)} of it and "
                f"commit_memory {format_bytes(self.commit_bytes)}; give more, or less to those.",
            )
        if self.version_memory is not None and self.version_memory > self.page_bytes:
            raise FieldProblem(
                ("version_memory",),
                format_bytes(self.version_memory),
                f"is more than pages may have, {format_bytes(self.page_bytes)}, of which it is a part.",
            )
        if self.context_memory is not None and self.context_memory > self.client_bytes:
            raise FieldProblem(
                ("context_memory",),
                format_bytes(self.context_memory),
                f"is more than client_memory, {format_bytes(self.client_bytes)}, of which it is a part.",
            )
        return self

    @field_validator("num_gpus")
    @classmethod
    def _whole_gpus(cls, num_gpus: float) -> float:
        if num_gpus > 1 and num_gpus != int(num_gpus):
            raise ValueError("is not whole; Ray gives a fraction of one GPU, or whole ones.")
        return num_gpus

    @field_validator("resources")
    @classmethod
    def _custom_only(cls, resources: dict[str, float]) -> dict[str, float]:
        for name in resources:
            if name in _RESOURCES_WITH_FIELDS:
                raise ValueError(f"names {name}, which has its own field: shard.{_RESOURCES_WITH_FIELDS[name]}.")
        return resources

    @model_validator(mode="after")
    def _device_and_gpus(self) -> Self:
        if self.device == "cuda" and not self.num_gpus:
            raise FieldProblem(
                ("device",), self.device, "needs num_gpus above 0: Ray hides every GPU from a shard that asks for none."
            )
        if self.device == "cpu" and self.num_gpus:
            raise FieldProblem(
                ("num_gpus",), self.num_gpus, 'reserves a GPU that device "cpu" never uses; give 0, or device "auto".'
            )
        return self


class RayConfig(ConfigModel):
    """Where Ray is.

    Args:
        address: "auto": the cluster of this machine, or one started here where there is none; "local": always one
            started here; "host:port": that cluster's head.
        autoscaling: Nodes join that cluster by themselves when shards ask for more than is free: new shards are waited
            for. Otherwise a rescale for which there is no room is refused at once.
    """

    address: Annotated[str, AfterValidator(_ray_address)] = "auto"
    autoscaling: Flag = False


class ClusterConfig(ConfigModel):
    """A whole cluster file.

    Args:
        pool: The pool as a whole.
        shard: What each shard gets.
        ray: Where Ray is.
        tables: Tables that exist from the start; a table taken out of the file is kept in the pool.

    Raises:
        ConfigError: Something is wrong; the message names each field, its value and what to do.
    """

    pool: PoolConfig
    shard: ShardConfig = ShardConfig()
    ray: RayConfig = RayConfig()
    tables: tuple[TableConfig, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, data: object) -> object:
        """A section whose lines are all commented out reads as null in YAML; it means the defaults."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name not in _OPTIONAL_SECTIONS}

    @field_validator("tables")
    @classmethod
    def _unique_names(cls, tables: tuple[TableConfig, ...]) -> tuple[TableConfig, ...]:
        first: dict[str, int] = {}
        for index, table in enumerate(tables):
            if first.setdefault(table.name, index) != index:
                raise FieldProblem(
                    (index, "name"), table.name, f"is the name of tables[{first[table.name]}] too; give each its own."
                )
        return tables
