"""The disk cache of compiled CPU kernels, which processes that start at once and edited sources share."""

import errno
import os
import sys
from pathlib import Path

import pytest

from mempool import kernels
from mempool.kernels.cpu import admission, bags, initial, rows, runtime, sorting, updates
from mempool.kernels.cpu.experts import passes
from mempool.kernels.cpu.runtime import KernelCacheFile, source_stamp
from mempool.kernels.cpu.scoring import flat, topk


def cache_file(folder: Path, *, stamp: str = "stamp") -> KernelCacheFile:
    return KernelCacheFile(str(folder), "kernel", stamp)


def test_what_is_saved_is_found_again(tmp_path):
    cache_file(tmp_path).save("float32", "code of float32")
    cache_file(tmp_path).save("bfloat16", "code of bfloat16")
    assert cache_file(tmp_path).load("float32") == "code of float32"
    assert cache_file(tmp_path).load("bfloat16") == "code of bfloat16"
    assert cache_file(tmp_path).load("float64") is None


@pytest.mark.parametrize("moment", ["_load_index", "_save_index", "_save_data"])
@pytest.mark.parametrize("other_saw_the_index", [False, True])
def test_processes_that_compile_at_once_never_take_each_others_code(tmp_path, moment, other_saw_the_index):
    """Another process saves another signature at any moment of this one's save, whether or not it saw its index."""
    this, other = cache_file(tmp_path), cache_file(tmp_path)
    if not other_saw_the_index:
        other._load_index = dict
    own = getattr(this, moment)

    def interrupted(*args):
        other.save("bfloat16", "code of bfloat16")
        return own(*args)

    setattr(this, moment, interrupted)
    this.save("float32", "code of float32")
    for _ in range(2):
        for dtype in ("float32", "bfloat16"):
            found = cache_file(tmp_path).load(dtype)
            assert found in (None, f"code of {dtype}")
            if found is None:
                cache_file(tmp_path).save(dtype, f"code of {dtype}")
    assert cache_file(tmp_path).load("float32") == "code of float32"
    assert cache_file(tmp_path).load("bfloat16") == "code of bfloat16"


def test_a_disk_that_takes_no_more_fails_no_kernel(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = cache_file(tmp_path)
    monkeypatch.setattr(file, "_save_data", full)
    file.save("float32", "code of float32")
    assert "No space left on device" in caplog.text
    assert cache_file(tmp_path).load("float32") is None


def test_code_of_other_sources_is_not_taken(tmp_path):
    cache_file(tmp_path, stamp="before").save("float32", "code of before")
    assert cache_file(tmp_path, stamp="after").load("float32") is None


class _Arguments:
    """Of a signature, a named tuple of a module."""


def test_an_index_of_sources_that_had_other_types_is_none(tmp_path, monkeypatch):
    """Their types are read before their stamp is."""
    cache_file(tmp_path, stamp="before").save(_Arguments(), "code of before")
    monkeypatch.delattr(sys.modules[__name__], "_Arguments")
    after = cache_file(tmp_path, stamp="after")
    assert after.load("float32") is None
    after.save("float32", "code of after")
    assert cache_file(tmp_path, stamp="after").load("float32") == "code of after"


def test_the_stamp_is_of_every_source_and_of_nothing_else(tmp_path):
    (tmp_path / "kernel.py").write_text("import shared")
    (tmp_path / "shared.py").write_text("x = 1")
    before = source_stamp(tmp_path)
    os.utime(tmp_path / "shared.py", (1, 1))
    (tmp_path / "kernel.nbi").write_text("an index")
    assert source_stamp(tmp_path) == before
    (tmp_path / "shared.py").write_text("x = 2")
    assert source_stamp(tmp_path) != before


def test_every_kernel_has_such_a_cache():
    """Every function that Python may call; those that kernels are made of are in the kernels' files."""
    kernels.implementation("numba")
    found = {
        name: kernel._cache
        for module in (admission, bags, flat, initial, passes, rows, sorting, topk, updates)
        for name, kernel in vars(module).items()
        if hasattr(kernel, "signatures") and not kernel.targetoptions.get("no_cpython_wrapper")
    }
    assert len(found) > 15
    folder = Path(runtime.__file__).parent
    folders = (folder.parent, folder, folder / "experts", folder / "scoring")
    assert {path.parent for path in folder.rglob("*.py")} == set(folders[1:])
    stamp = "".join(map(source_stamp, folders))
    for name, cache in found.items():
        assert isinstance(cache._cache_file, KernelCacheFile), name
        assert cache._cache_file._source_stamp == stamp, name


def test_kernels_hold_no_interpreter_lock():
    kernels.implementation("numba")
    found = [
        one
        for module in (admission, bags, flat, rows, topk, updates)
        for one in vars(module).values()
        if hasattr(one, "signatures")
    ]
    assert len(found) > 30
    assert all(one.targetoptions["nogil"] for one in found)


def test_what_kernels_are_made_of_refuses_python():
    """It has no code that Python could run."""
    for _ in range(2):
        with pytest.raises(TypeError, match="mix is compiled into kernels"):
            initial.mix(1)
        kernels.initial_values(0, 0, 1, 0, 1, 1.0)
