"""How the suite shares its workers: a file's tests go to one of them, the long files first, so that none idles at the
end; files that share what is long to make go to one together."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

_LONG = ("test_triton.py", "contract", "test_parts.py", "test_training.py", "test_distributed.py")

_TOGETHER = ("tests/contract", "tests/unit/examples")


hypothesis.settings.register_profile("mempool", deadline=None)  # a timing is no test
hypothesis.settings.load_profile("mempool")


def _place(item: pytest.Item) -> int:
    for place, name in enumerate(_LONG):
        if name in (item.path.name, item.path.parent.name):
            return place
    return len(_LONG)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)


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
