"""How CPU kernels are compiled and started: a threading layer that bears several Python threads, the disk cache,
as many threads as torch uses, tensors as numpy views. Kernels themselves live beside it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import logging
import mmap
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.ir as typed_ir
import numba as typed_numba
import numpy as np
import torch
from numba.core import caching as typed_caching
from numba.core import cgutils as typed_cgutils
from numba.core import types as typed_types
from numba.core.registry import CPUDispatcher as typed_dispatcher
from numba.core.registry import cpu_target as typed_cpu_target
from numba.extending import intrinsic as typed_intrinsic
from numba.np.ufunc import parallel as typed_threads
from numpy.typing import NDArray
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.compiling import watched
from mempool.kernels.teams import keep_apart

logger = logging.getLogger(__name__)

Array = NDArray[Any]
# Numba's type stubs leave out most of what is used here.
numba: Any = typed_numba
caching: Any = typed_caching
cgutils: Any = typed_cgutils
types: Any = typed_types
ir: Any = typed_ir
cpu_target: Any = typed_cpu_target
CPUDispatcher: Any = typed_dispatcher
intrinsic: Any = typed_intrinsic
numba_threads: Any = typed_threads

_F = TypeVar("_F", bound=Callable[..., Any])

# Numba's own "workqueue" layer aborts the process when two Python threads run kernels at once, so it is never taken.
_SAFE_LAYERS = {"omp": "numba.np.ufunc.omppool", "tbb": "numba.np.ufunc.tbbpool"}

# Division by zero gives inf or NaN, as in torch; Python's exception would also keep loops from being vectorised.
_OPTIONS = {"nogil": True, "error_model": "numpy"}
_ELEMENTS_PER_THREAD = 1 << 17
_HUGE_PAGE_BYTES = 1 << 21
_LINE_BYTES = 64


class NoSafeThreadingLayerError(ImportError):
    """Numba has no threading layer that may be used from several Python threads."""


def _target() -> tuple[str, list[str]]:
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return str(triple), str(features).split(",")


def has_wide_registers() -> bool:
    """Whether kernels are compiled for 32 vector registers of 64 bytes (AVX-512)."""
    return "+avx512f" in _target()[1]


def converts_halves() -> bool:
    """Whether the processor that kernels are compiled for turns float16 into float32 itself."""
    triple, features = _target()
    return "+f16c" in features or triple.startswith(("aarch64", "arm64"))


def choose_threading_layer() -> str:
    """Select a threading layer which several Python threads may use at once, before the first kernel runs.

    Returns:
        "omp" or "tbb".

    Raises:
        NoSafeThreadingLayerError: Neither is installed, or another part of the process already started an unsafe one.
    """
    try:
        running = numba.threading_layer()
    except ValueError:  # Numba's way to say that none has been started yet
        running = None
    if running is not None:
        if running not in _SAFE_LAYERS:
            raise NoSafeThreadingLayerError(
                f"Numba already runs its {running!r} threading layer, which aborts when several threads use it; "
                "set NUMBA_THREADING_LAYER=omp before the process starts"
            )
        return str(running)
    for name, module in _SAFE_LAYERS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        numba.config.THREADING_LAYER = name
        return name
    raise NoSafeThreadingLayerError(
        "Numba finds neither OpenMP (libgomp.so.1) nor TBB; install one: `apt install libgomp1` or `pip install tbb`"
    )


def source_stamp(folder: Path) -> str:
    """Changes with the text of any source file of the folder: kernels are compiled with functions of other files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _own_stamp() -> str:
    # Kernels hold constants of the modules above their folder too.
    folder = Path(__file__).parent
    folders = sorted({path.parent for path in folder.rglob("*.py")})
    return "".join(map(source_stamp, (folder.parent, *folders)))


class KernelCacheFile(caching.IndexDataCacheFile):  # type: ignore[misc]
    """Numba's disk cache of one kernel, with a file of compiled code for each signature that no other signature uses.

    Numba numbers these files by an index that it reads, changes and writes without a lock. Of several processes that
    compile different signatures at once, one then finds another's code under its own signature, for ever. A lost entry
    of the index only means to compile again.
    """

    def _load_index(self) -> dict[Any, str]:
        try:
            index: dict[Any, str] = super()._load_index()
        except (AttributeError, ImportError, EOFError, TypeError, ValueError, pickle.UnpicklingError):
            return {}  # of other sources, which had types that there are no more: they are read before the stamp is
        return index

    def save(self, key: Any, data: Any) -> None:
        """Keep the compiled code ``data`` of the signature (and target) ``key``."""
        digest = hashlib.sha256(f"{self._source_stamp} {key!r}".encode()).hexdigest()[:20]
        name = self._data_name_pattern.replace("{number:d}", digest)
        try:
            self._save_data(name, data)
            self._save_index(self._load_index() | {key: name})
        except OSError as error:
            logger.warning("kernels will be compiled again in the next process: cannot write %s: %s", name, error)


def kernel(function: _F) -> _F:
    """Compile a function that Python calls, without the interpreter lock, and keep it on disk.

    What it calls is compiled into it. Strict IEEE arithmetic, nothing reassociated.
    """
    try:
        compiled = numba.njit(cache=True, no_cfunc_wrapper=True, **_OPTIONS)(function)
    except RuntimeError:  # no directory for the disk cache is writable: compile in memory, once a process
        compiled = numba.njit(no_cfunc_wrapper=True, **_OPTIONS)(function)
    compiler: Any = getattr(compiled, "_compiler", None)  # None where NUMBA_DISABLE_JIT leaves the Python function
    if compiler is not None:
        compiler.compile = watched(compiler.compile, function.__name__)
    cache: Any = getattr(compiled, "_cache", None)
    if hasattr(cache, "_cache_file"):
        cache._cache_file = KernelCacheFile(cache._cache_path, cache._impl.filename_base, _own_stamp())
    return compiled  # type: ignore[no-any-return]


class _Inner(CPUDispatcher):  # type: ignore[misc]
    # Without code for Python, a call from there would jump to address 0.
    def __call__(self, *_: object, **__: object) -> None:
        raise TypeError(f"{self.__name__} is compiled into kernels, which alone can call it")


def serial(function: _F, **options: Any) -> _F:
    """Compile a function that kernels call on their thread, and Python never does.

    It is compiled into every kernel that uses it: alone it is neither kept on disk nor made into machine code.
    """
    options |= {"nopython": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, **_OPTIONS}
    return _Inner(py_func=function, targetoptions=options)


def inlined(function: _F) -> _F:
    """As ``serial``, but never called: for what a loop over bags or rows calls each time.

    A call passes an arena, member by member, through the stack: tens of stores that wait behind those of the last row.
    """
    return serial(function, forceinline=True)


def reassociating(function: _F) -> _F:
    """As ``serial``, for sums over columns that may be reordered into vector lanes (still NaN and inf safe)."""
    return serial(function, fastmath={"reassoc", "contract", "nsz"})


def use_threads(num_elements: int) -> int:
    """Set how many threads the calling thread's next kernels run on: as many as torch uses, fewer for little work.

    Waking a thread costs more than reading some 100,000 elements, and on a busy machine far more. No kernel's result
    depends on the number of threads.

    Returns:
        The number of threads.

    Raises:
        RuntimeError: The process was forked from one that had run kernels.
    """
    enough = 1 + num_elements // _ELEMENTS_PER_THREAD
    if _launch_threads() != os.getpid():
        raise RuntimeError(
            f"process {os.getpid()} was forked from process {_launch_threads()}, which had run kernels: their threads "
            "do not live on in a fork. Start processes by 'spawn' or 'forkserver', or fork before the first kernel."
        )
    num_threads = min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS), enough)
    # Not numba's own function: it takes locks of Python's that an interrupt can leave taken, for ever.
    numba_threads._set_num_threads(num_threads)
    if num_threads > 1:
        keep_apart(num_threads)
    return num_threads


def several_tasks(num_threads: int, each: int) -> int:
    """Into how many tasks to cut work for ``spread``: ``each`` for every thread, but a single one for one thread."""
    return each * num_threads if num_threads > 1 else 1


@functools.cache
def _launch_threads() -> int:
    # Numba and torch share one OpenMP. Numba's start sets the number of threads of the thread that starts it to all
    # processors, over torch's choice: so that is a thread which does nothing else.
    starter = threading.Thread(target=lambda: numba.set_num_threads(1))
    starter.start()
    starter.join()
    return os.getpid()


def storage(tensor: Tensor) -> Array:
    """View a contiguous tensor as an array, bfloat16 as its bits in uint16. Shares memory."""
    detached = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return detached.view(torch.int16).numpy().view(np.uint16)
    return detached.numpy()


def elements(paged: Paged) -> Array:
    """View an arena's rows: float32, uint16 (bfloat16's bits), int8, or uint8 (float8_e4m3fn's bits). Shares memory.

    Packed rows come whole, [R, row_bytes]: ``paged.width`` elements, then what ``scales`` shows.
    """
    rows = storage(paged.rows)
    return rows.view(np.int8) if paged.element == "int8" else rows


def scales(paged: Paged) -> tuple[Array, int]:
    """View packed rows as float32 [R, row_bytes // 4], with the column of the first block's scale. Shares memory.

    Rows of other elements have no scales: they come with an array [1, 0] that nobody reads.
    """
    if paged.packed is None:
        return NO_SCALES, 0
    return storage(paged.rows).view(np.float32), paged.packed.scales_start // 4


def view(tensor: Tensor) -> Array:
    """View a tensor as a C-ordered array; copies only where it is not contiguous."""
    # Asked before it is done: of a small call each call costs as much as its arithmetic.
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor if tensor.is_contiguous() else tensor.contiguous()).numpy()


NO_SCALES: Array = np.empty((1, 0), dtype=np.float32)
EMPTY_WEIGHTS: Array = np.empty(0, dtype=np.float32)


def optional_weights(weights: Tensor | None) -> Array:
    """Weights as an array; none given is told to kernels by an empty array, which reads as all ones."""
    return EMPTY_WEIGHTS if weights is None else view(weights)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages behind a large CPU tensor that nobody has written yet, and return it.

    A new tensor of 128 MiB costs its first writer 30,000 page faults otherwise, several times the writing itself. Where
    the system has no huge pages, nothing happens.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    num_bytes = tensor.data_ptr() + tensor.numel() * tensor.element_size() - first
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and num_bytes >= 2 * _HUGE_PAGE_BYTES:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(num_bytes), advice)
    return tensor


@intrinsic  # type: ignore[untyped-decorator]
def prefetch_line(typing_context: Any, matrix: Any, row: Any, byte: Any) -> Any:  # noqa: ARG001
    """Begin to bring the line with a byte of an element, or a row, of a C-ordered array into the cache."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole, number = ir.IntType(64), ir.IntType(32)
        pointer = ir.IntType(8).as_pointer()
        array = context.make_array(signature.args[0])(context, builder, args[0])
        row_bytes = builder.extract_value(array.strides, 0)
        start = builder.add(builder.ptrtoint(array.data, whole), builder.mul(args[1], row_bytes))
        address = builder.inttoptr(builder.add(start, args[2]), pointer)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        # To be read, into the second level, data: lines on their way to the first fill its few buffers, and loads wait.
        # Not to be written: a row that is read alone must not be taken from other processors.
        builder.call(
            builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind),
            [address, number(0), number(2), number(1)],
        )
        return context.get_dummy_value()

    return types.void(matrix, types.int64, types.int64), generate


@serial
def prefetch_row(matrix: Array, row: int) -> None:
    """Begin to bring a row of a C-ordered matrix into the cache, for code that reads rows all over the memory."""
    for byte in range(0, matrix.shape[1] * matrix.itemsize, _LINE_BYTES):
        prefetch_line(matrix, row, byte)


# Numba's own prange compiles a loop's body several times over, into one library after another.
@intrinsic  # type: ignore[untyped-decorator]
def spread(typing_context: Any, num_tasks: Any, function: Any, args: Any) -> Any:  # noqa: ARG001
    """Call ``function(task, *args)`` for every task below ``num_tasks``, on as many threads as ``use_threads`` set.

    Threads take the next task whenever they are free: so they end together, however unequal the work is, and whichever
    of them the system stops for a while. Who calls the kernel has called ``use_threads``, which loads what this needs.

    Args:
        num_tasks: int64.
        function: A ``serial`` function that returns nothing. Its first argument is int64.
        args: A tuple of what else it takes, shared by all threads.
    """
    call = function.get_call_type(typing_context, (types.int64, *args.types), {})

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
        compiled = function.dispatcher.get_compile_result(call)
        context.add_linking_libs([compiled.library])
        whole, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
        given = _borrowed(context, builder, args, values[2])
        shared = ir.LiteralStructType([whole, whole, whole, given.type])  # next task, tasks, failures, arguments
        data = cgutils.alloca_once(builder, shared)
        for place, value in enumerate((whole(0), values[0], whole(0), given)):
            builder.store(value, cgutils.gep_inbounds(builder, data, 0, place))
        work = _thread_work(context, builder.module, shared, compiled.fndesc, call)
        count_threads = cgutils.get_or_insert_function(builder.module, ir.FunctionType(whole, []), "get_num_threads")
        num_threads = builder.call(count_threads, [])
        run = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer] * 5 + [whole] * 3), "numba_parallel_for"
        )
        # It calls work(arrays, [n], steps, data), with n that add up to the number of threads, and no arrays.
        counts = cgutils.alloca_once_value(builder, num_threads)
        pointers = [builder.bitcast(value, pointer) for value in (work, pointer(None), counts, counts, data)]
        builder.call(run, [*pointers, whole(0), whole(0), num_threads])
        failures = builder.load(cgutils.gep_inbounds(builder, data, 0, 2))
        with cgutils.if_unlikely(builder, cgutils.is_not_null(builder, failures)):
            context.call_conv.return_user_exc(builder, MemoryError, ("a thread of a kernel failed",))
        return context.get_dummy_value()

    return types.void(types.int64, function, args), generate


@intrinsic  # type: ignore[untyped-decorator]
def borrowed(typing_context: Any, arrays: Any) -> Any:  # noqa: ARG001
    """Arrays, one or a tuple, whose references nobody counts: who has made them calls ``keep`` of his own at the end.

    Counts are atomic: each waits until all that was written before has reached the cache, a row that is nowhere near
    it among that. A loop over rows must change none.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _borrowed(context, builder, signature.args[0], values[0])

    return arrays(arrays), generate


@intrinsic  # type: ignore[untyped-decorator]
def keep(typing_context: Any, arrays: Any) -> Any:  # noqa: ARG001
    """Have arrays live up to here."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
        return context.get_dummy_value()

    return types.void(arrays), generate


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The value with arrays whose references nobody counts: threads would take the counts from each other all along."""
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = array.meminfo.type(None)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        for place, member in enumerate(kind.types):
            borrowed = _borrowed(context, builder, member, builder.extract_value(value, place))
            value = builder.insert_value(value, borrowed, place)
    return value


def _thread_work(context: Any, module: Any, shared: Any, compiled: Any, call: Any) -> Any:
    """What each thread runs: the next task, until none is left."""
    whole, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer] * 4)
    work = ir.Function(module, kind, module.get_unique_name("thread_work"))
    work.linkage = "internal"
    builder = ir.IRBuilder(work.append_basic_block("entry"))
    data = builder.bitcast(work.args[3], shared.as_pointer())
    counter, num_tasks, failures, args = (cgutils.gep_inbounds(builder, data, 0, place) for place in range(4))
    num_tasks = builder.load(num_tasks)
    arguments = cgutils.unpack_tuple(builder, builder.load(args))
    following, body, end = (builder.append_basic_block(name) for name in ("next", "task", "end"))
    builder.branch(following)
    builder.position_at_end(following)
    task = builder.atomic_rmw("add", counter, whole(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", task, num_tasks), body, end)
    builder.position_at_end(body)
    status, _ = context.call_internal_no_propagate(builder, compiled, call, [task, *arguments])
    with cgutils.if_unlikely(builder, status.is_error):
        builder.store(whole(1), failures)
    builder.branch(following)
    builder.position_at_end(end)
    builder.ret_void()
    return work
