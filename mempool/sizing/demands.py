"""What a plan is made for: a model's memory layers and who trains them, and the hosts that there are."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mempool.config.amounts import ByteCount, format_bytes
from mempool.config.cluster import ShardConfig
from mempool.config.model import ConfigModel, FieldProblem, Flag, Number, WholeNumber
from mempool.errors import ConfigError
from mempool.types.messages import ReplyDtype

_CPU_SHARDS = 8


class Model(ConfigModel):
    """A model's memory layers, and the trainers of a data-parallel step.

    Args:
        heads: Queries of a token in each layer.
        topk: Slots that each of them takes; a token is one bag of heads * topk pairs.
        layers: Memory layers, each of which looks up once a step.
        shared: Whether they have one table between them; else one each.
        tokens: Of a step, of each trainer.
        trainers: Processes that train together.
        wire_dtype: Of values and of their gradients on the wire.
        tokens_per_s: What all trainers together shall reach; None: whatever comes of it.
    """

    heads: WholeNumber = Field(default=4, gt=0, le=4096)
    topk: WholeNumber = Field(default=32, gt=0, le=65536)
    layers: WholeNumber = Field(default=1, gt=0, le=4096)
    shared: Flag = True
    tokens: WholeNumber = Field(default=1024, gt=0, le=2**30)
    trainers: WholeNumber = Field(default=1, gt=0, le=2**20)
    wire_dtype: ReplyDtype = "float32"
    tokens_per_s: Number | None = Field(default=None, gt=0)

    @property
    def pairs(self) -> int:
        """Of a trainer's look-up in one layer."""
        return self.tokens * self.heads * self.topk

    @property
    def tables(self) -> int:
        """How many there are."""
        return 1 if self.shared else self.layers


class Hosts(ConfigModel):
    """Hosts of one kind, on which shards run.

    Args:
        memory: What the pool may have of each host's memory.
        cores: Of each host.
        gpus: Of each host; 0: shards are on the CPU, in its memory.
        gpu_memory: What the pool may have of each GPU.
        gpu_gb_per_s: Memory bandwidth of a GPU, 10^9 bytes a second.
        memory_gb_per_s: Memory bandwidth of a host, which its shards share; None: not looked at.
        shards: Of each host; None: one a GPU, or 8 on the CPU.
        nic_gbit_per_s: Of each host, of shards and of trainers, each way.
        latency_us: One way.
        trainers: Trainers that share a host's network.
    """

    memory: ByteCount = Field(default=512 * 2**30, ge=2**20)
    cores: WholeNumber = Field(default=64, gt=0, le=65536)
    gpus: WholeNumber = Field(default=0, ge=0, le=1024)
    gpu_memory: ByteCount = Field(default=64 * 2**30, ge=2**20)
    gpu_gb_per_s: Number | None = Field(default=None, gt=0)
    memory_gb_per_s: Number | None = Field(default=None, gt=0)
    shards: WholeNumber | None = Field(default=None, gt=0, le=4096)
    nic_gbit_per_s: Number = Field(default=100.0, gt=0)
    latency_us: Number = Field(default=20.0, ge=0)
    trainers: WholeNumber = Field(default=1, gt=0, le=1024)

    @model_validator(mode="after")
    def _devices(self) -> Self:
        if self.gpu_gb_per_s is not None and not self.gpus:
            raise FieldProblem(("gpu_gb_per_s",), self.gpu_gb_per_s, "is of GPUs, and a host has none: give gpus.")
        if self.gpus and self.shards is not None and self.shards % self.gpus:
            text = f"shards do not spread evenly over {self.gpus} GPUs; give a multiple."
            raise FieldProblem(("shards",), self.shards, text)
        return self

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where a shard's pages and kernels are."""
        return "cuda" if self.gpus else "cpu"

    @property
    def shards_each(self) -> int:
        """Shards of a host."""
        return self.shards or self.gpus or _CPU_SHARDS

    @property
    def shard_memory(self) -> int:
        """What one shard may hold in all, in whole MiB: ``shard.memory``."""
        num_bytes = self.gpus * self.gpu_memory if self.gpus else self.memory
        return num_bytes // self.shards_each // 2**20 * 2**20

    def shard(self) -> ShardConfig:
        """A shard's part of a cluster file.

        Raises:
            ConfigError: A shard would have too little memory.
        """
        if self.shard_memory < 2**20:
            where = f"{self.gpus} GPUs of {format_bytes(self.gpu_memory)}" if self.gpus else format_bytes(self.memory)
            raise ConfigError(
                f"{where} give each of {self.shards_each} shards less than 1MiB; give more, or fewer shards"
            )
        return ShardConfig(memory=self.shard_memory, num_gpus=float(bool(self.gpus)))

    @property
    def core_crowding(self) -> float:
        """How many times longer a shard's work on the CPU takes as cores are shared."""
        return max(1.0, self.shards_each / self.cores)

    @property
    def crowding(self) -> float:
        """The same of its kernels, which are on a GPU where there are GPUs."""
        return max(1.0, self.shards_each / self.gpus) if self.gpus else self.core_crowding
