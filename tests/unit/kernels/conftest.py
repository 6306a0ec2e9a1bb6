"""Which implementation the tests of this folder run, and where: Numba and torch's operations on the CPU by default.

``MEMPOOL_TEST_KERNELS=triton:cpu`` (under TRITON_INTERPRET=1) and ``triton:cuda`` run the same tests on Triton, in a
process of its own, since Triton reads TRITON_INTERPRET once, when it is imported.
"""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

CHOSEN = os.environ.get("MEMPOOL_TEST_KERNELS", "numba:cpu,torch:cpu").split(",")

# The interpreter takes milliseconds for what a kernel does in microseconds.
settings.register_profile("kernels", max_examples=6 if "triton:cpu" in CHOSEN else 40, deadline=None, database=None)


@pytest.fixture(scope="session", params=CHOSEN)
def under_test(request):
    """The implementation and the device on which its tensors lie."""
    from kernel_cases import UnderTest

    name, device = request.param.split(":")
    return UnderTest(name=name, device=device)


def pytest_collection_modifyitems(items):
    """The interpreter computes in numpy, which warns of inf - inf where a GPU does not."""
    if "triton:cpu" in CHOSEN:
        for item in items:
            item.add_marker(pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"))


@pytest.fixture(scope="session", autouse=True)
def fused_in_the_interpreter():
    """The interpreter rounds the product of ``tl.fma`` and its sum apart; here it rounds once, as a GPU does. And its
    ``tl.dot`` is a BLAS's, whose bits depend on the processor and on a row's place in the tile: here an exact one is a
    chain of such sums, as on a GPU."""
    if "triton:cpu" not in CHOSEN:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot = InterpreterBuilder.create_dot

    def fma(self, x, y, z):  # noqa: ARG001 - a method of the builder
        # The sum's 64 bits are rounded again to 24: too rarely another number for these tests to meet one.
        total = x.data.astype(np.longdouble) * y.data + z.data
        return TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if input_precision.name != "IEEE" or a.data.dtype != np.float32:
            return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        total = d.data
        for column, row in zip(a.data.astype(np.longdouble).T, b.data, strict=True):
            total = (column[:, None] * row + total).astype(np.float32)
        return TensorHandle(total, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fma", fma)
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


@pytest.fixture(scope="session", autouse=True)
def quicker_interpreter():
    """It prepares the whole language again for each function that a kernel calls; once for each launch is enough. And
    it makes a table of all dtypes for each dtype that it looks up there, and checks and wraps the few shapes that there
    are again for each value."""
    if "triton:cpu" not in CHOSEN:
        yield
        return
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    prepare, look_up = interpreter._patch_lang, interpreter._get_np_dtype
    known: dict[str, np.dtype] = {}

    def once(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        prepared = not any(tl.core.is_builtin(language.load) for language in languages)
        return interpreter._LangPatchScope() if prepared else prepare(function)

    def looked_up(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if element.name not in known:
            known[element.name] = look_up(element)
        return known[element.name]

    make_type, broadcast = tl.block_type.__init__, TritonSemantic.broadcast_impl_value
    shapes: dict[tuple, tuple] = {}
    wrapped: dict[tuple, tuple] = {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, *[side.value if isinstance(side, tl.constexpr) else side for side in shape]
        if key not in shapes:
            make_type(self, element_ty, shape)
            shapes[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = shapes[key]

    def tensor(self, handle, type):
        shape = tuple(type.shape.values) if type.is_block() else ()
        if shape not in wrapped:
            wrapped[shape] = tl.tuple([tl.constexpr(side) for side in shape]), tl.constexpr(math.prod(shape))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = wrapped[shape]

    def broadcast_unlike(self, lhs, rhs):
        alike = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        patch.setattr(interpreter, "_get_np_dtype", looked_up)
        patch.setattr(tl.block_type, "__init__", block_type)
        patch.setattr(tl.tensor, "__init__", tensor)
        patch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_unlike)
        yield


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """New memory holds NaN, and whole numbers their largest: what a kernel does not write is no accidental zero."""
    torch._C._set_deterministic_algorithms(True)  # the public call imports torch's compiler, which takes seconds
    yield
    torch._C._set_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Tests that are about threads set their own number; the others are small and must not wake threads for nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
