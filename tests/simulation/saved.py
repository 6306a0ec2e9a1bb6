"""The checkpoints that a run has taken, and whether each is of one moment."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mempool.checkpoint.format.manifest import Manifest
from mempool.types import StepId, TableSource


@dataclass(frozen=True, slots=True)
class Origin:
    """What a table was restored from: a table, at a version; taken_s: when that checkpoint was begun and ended."""

    table_id: int
    version: int
    taken_s: tuple[float, float]


@dataclass
class Saved:
    """The checkpoints of one run.

    Attributes:
        manifests: All that were written, by name, those too that nobody was told of.
        ended_s: When each was written.
        asked_s: When those were asked for that somebody was told of.
    """

    manifests: dict[str, Manifest] = field(default_factory=dict)
    ended_s: dict[str, float] = field(default_factory=dict)
    asked_s: dict[str, float] = field(default_factory=dict)
    began_s: dict[str, float] = field(default_factory=dict)

    def note(self, manifest: Manifest, now_s: float) -> None:
        """A manifest is written."""
        self.manifests[manifest.name] = manifest
        self.ended_s[manifest.name] = now_s

    def note_begun(self, name: str, asked_s: float) -> None:
        """A checkpoint has its name; its moment comes after it was asked for."""
        self.began_s[name] = asked_s

    def note_taken(self, name: str) -> None:
        """Somebody was told that it is whole."""
        self.asked_s[name] = self.began_s[name]

    def origin(self, source: TableSource) -> Origin:
        """What it names."""
        state = self.manifests[source.checkpoint].tables[source.table]
        taken_s = self.began_s.get(source.checkpoint, 0.0), self.ended_s[source.checkpoint]
        return Origin(state.schema.table_id, state.version, taken_s)

    def check_moments(
        self,
        together: Iterable[tuple[tuple[int, StepId], ...]],
        decided: Mapping[tuple[int, int], Any],
        acknowledged: Callable[[int], list[tuple[float, int]]],
        *,
        say: Callable[[str], None],
    ) -> None:
        """A step of several tables is in a checkpoint of them or it is not; what was acknowledged before is in it."""
        if not self.manifests:
            return
        made = {(table_id, step.step_id): version for (table_id, version), step in decided.items()}
        known = {name: {t.schema.table_id: t.version for t in m.tables.values()} for name, m in self.manifests.items()}
        for steps in together:
            for name, versions in known.items():
                inside = {made[step] <= versions[step[0]] for step in steps if step in made and step[0] in versions}
                if len(inside) > 1:
                    say(f"checkpoint {name} at {versions} has a part of the step {steps}")
        for name, asked_s in self.asked_s.items():
            for table_id, version in known[name].items():
                least = max((made for at_s, made in acknowledged(table_id) if at_s < asked_s), default=0)
                if version < least:
                    say(f"checkpoint {name} has version {version} of table {table_id}; {least} was acknowledged before")
