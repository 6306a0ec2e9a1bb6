"""Cluster files: ``load`` reads one and says what is wrong by file and line; ``set_shards`` edits one number in it.

Leaves to others: what the fields mean (``cluster``), and what a change of the file does (``changes``).
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mempool.config.cluster import ClusterConfig
from mempool.config.model import path_text
from mempool.errors import ConfigError

if TYPE_CHECKING:
    from mempool.config.yaml_nodes import Document


def load(path: str | Path) -> ClusterConfig:
    """Read a cluster file.

    Args:
        path: A YAML file, UTF-8.

    Raises:
        ConfigError: The file is missing, is not YAML or says something wrong: all problems at once, by file and line.

    Example:
        >>> load("cluster/local.yaml").pool.shards
        2
    """
    return _validate(_parse(_read(path), path), path)


def set_shards(path: str | Path, shards: int) -> ClusterConfig:
    """Change ``pool.shards`` in a cluster file and leave every other character, comments too, as it is.

    Args:
        path: The file; it is replaced in one step, so a reader sees it before or after, never between.
        shards: The new number of shards.

    Returns:
        The configuration the file holds now.

    Raises:
        ConfigError: The file is wrong, the number is not possible, or the file says it by an anchor or alias. The
            file is unchanged then.
    """
    text = _read(path)
    before = _parse(text, path)
    _validate(before, path)
    span = before.span(("pool", "shards"))
    assert span is not None, "a valid configuration has pool.shards"
    if not text[span[0]].isdigit():  # an anchor: other fields may speak of it
        raise ConfigError(
            f"{path}:{before.line(('pool', 'shards'))}: pool.shards is not written as a plain number of its own, so "
            f"changing it would change more. Write `shards: {shards}` there by hand."
        )
    edited = text[: span[0]] + str(shards) + text[span[1] :]
    after = _validate(_parse(edited, path), path)
    _replace(Path(path), edited)
    return after


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file. Start from cluster/local.yaml of the repository.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}). Is it a cluster file?") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error


def _parse(text: str, path: str | Path) -> "Document":
    try:
        from mempool.config.yaml_nodes import parse  # here, because PyYAML is no part of the base install
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path}: reading a cluster file needs PyYAML, which is not installed: pip install 'mempool[server]'"
        ) from error
    return parse(text, file=str(path))


def _validate(document: "Document", path: str | Path) -> ClusterConfig:
    if not isinstance(document.data, dict):
        what = "is empty" if document.data is None else "is not a mapping"
        raise ConfigError(f"{path}: {what}; it must have at least `pool: {{name: NAME, shards: N}}`.")
    checked = ClusterConfig.check(document.data, context={"folder": Path(path).parent})
    if isinstance(checked, ClusterConfig):
        return checked
    found = sorted((document.line(problem.loc), f"{path_text(problem.loc)}{problem.text}") for problem in checked)
    raise ConfigError("\n".join(f"{path}:{line}: {text}" for line, text in found))


def _replace(path: Path, text: str) -> None:
    """Write beside the file and rename. A link stays a link: what it points to is replaced."""
    target = path.resolve()
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, target.stat().st_mode & 0o7777)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
