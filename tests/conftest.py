"""How the suite shares its workers: a file's tests go to one of them, the long files first, so that none idles at the
end; files that share what is long to make go to one together."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from kinds import LONG

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

_LONG = ("test_triton.py", "contract", "test_parts.py", "test_training.py", "test_distributed.py")

_TOGETHER = ("tests/contract", "tests/unit/examples")


_FEW = 20

hypothesis.settings.register_profile("mempool", deadline=None)  # a timing is no test
hypothesis.settings.load_profile("mempool")


def _place(item: pytest.Item) -> int:
    for place, name in enumerate(_LONG):
        if name in (item.path.name, item.path.parent.name):
            return place
    return len(_LONG)


def _look_less(item: pytest.Item) -> None:
    """At a third of the examples that a test of hypothesis asks for: they are other ones in each run."""
    function = getattr(item, "obj", None)
    own = getattr(function, "_hypothesis_internal_use_settings", hypothesis.settings.default)
    if hasattr(function, "hypothesis") and own.max_examples > _FEW:
        few = max(_FEW, own.max_examples // 3)
        function._hypothesis_internal_use_settings = hypothesis.settings(own, max_examples=few)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    if not LONG:
        for item in items:
            _look_less(item)


def _settle() -> None:
    """Thousands of tests and what they import stay; each collection of a test's garbage would walk through them."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    _settle()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:  # what this file was the first to import stays too
        _settle()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class FilesAndFolders(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((folder for folder in _TOGETHER if file.startswith(f"{folder}/")), file)

    return FilesAndFolders(config, log)
