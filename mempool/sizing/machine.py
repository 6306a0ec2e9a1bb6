"""A machine's constants, as `mempool bench plan` measures and keeps them, and as a plan reads them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from mempool.errors import ConfigError
from mempool.sizing.traffic import TERMS

FORMAT = 1
_KERNEL_TERMS = ("row", "byte")

Constants = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Seconds of one shard's kernels, by row and by byte (see ``traffic``).

    Attributes:
        gather: Of a look-up.
        update: Of the weights' gradient, and of the commit.
    """

    gather: Constants
    update: Constants


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of one kind of call beside its kernels, by ``traffic.TERMS``.

    Attributes:
        wall: From beginning to end, client and shards on that machine.
        client: CPU of the client's process.
        server: CPU of one shard's process: "call", "pair" and "column". Nothing where shards are in the client's.
    """

    wall: Constants
    client: Constants
    server: Constants


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """A way to shards. gather: A look-up alone. step: A look-up, its update and the commit, together."""

    gather: Costs
    step: Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was measured on one machine.

    Attributes:
        name: As of result files.
        copy_bytes_per_s: Read and written by a copy of one thread, beside which kernels elsewhere are guessed.
        kernels: By device, "cpu" or "cuda"; of one thread on the CPU.
        paths: By name.
    """

    name: str
    copy_bytes_per_s: float
    kernels: Mapping[str, Kernels]
    paths: Mapping[str, Path]

    def document(self) -> dict[str, Any]:
        """As it stands in the result file."""
        return {"constants_format": FORMAT, **asdict(self)}

    @classmethod
    def of(cls, document: object, *, where: str) -> Self:
        """The constants in a result file.

        Args:
            document: What the file holds, or its "constants" alone.
            where: Its name, in errors.

        Raises:
            ConfigError: It holds no constants of this format.
        """
        found = document.get("constants", document) if isinstance(document, dict) else None
        if not isinstance(found, dict) or found.get("constants_format") != FORMAT:
            raise ConfigError(
                f"{where} holds no constants of a machine in format {FORMAT}: make it with mempool bench plan --out DIR"
            )
        try:
            kernels = {
                str(device): Kernels(**{part: _numbers(given[part], _KERNEL_TERMS) for part in ("gather", "update")})
                for device, given in found["kernels"].items()
            }
            paths = {
                str(name): Path(**{call: _costs(given[call]) for call in ("gather", "step")})
                for name, given in found["paths"].items()
            }
            copy = float(found["copy_bytes_per_s"])
            name = str(found["name"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{where} is damaged, or was edited: {type(error).__name__} {error}. Make it again with mempool bench "
                "plan --out DIR"
            ) from None
        if not (kernels.get("cpu") and paths and math.isfinite(copy) and copy > 0.0):
            raise ConfigError(
                f"{where} lacks kernels of the CPU, a path or the copy's bandwidth: make it again with mempool bench "
                "plan --out DIR"
            )
        return cls(name=name, copy_bytes_per_s=copy, kernels=kernels, paths=paths)


def _costs(given: Mapping[str, Mapping[str, object]]) -> Costs:
    return Costs(**{part: _numbers(given[part], TERMS) for part in ("wall", "client", "server")})


def _numbers(given: Mapping[str, object], known: tuple[str, ...]) -> Constants:
    """Terms that are known, each a finite number that is not negative."""
    found = {}
    for term, value in given.items():
        if term not in known:
            raise ValueError(f"unknown term {term!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
            raise ValueError(f"{term} = {value!r} is no number of seconds")
        found[term] = float(value)
    return found
