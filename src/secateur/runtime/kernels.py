"""The compiled kernels, called through their C interface (csrc/secateur.h). Nothing else loads the library."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from secateur.errors import DataError, TargetError

ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""What a product may be followed by."""

ISAS = ("portable", "avx2", "avx512")

VERSION = 2
_LIBRARY, _ISA = "SECATEUR_KERNELS", "SECATEUR_ISA"  # environment: another library file, another instruction set


class _Finish(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("bias", "residual")),
        *((name, c_int32) for name in ("activation", "threads", "quantize")),
    )


class _Images(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "channels", "height", "width")),
        *((name, c_int64 * 2) for name in ("kernel", "stride", "padding", "dilation")),
    )


class Handle:
    """A packed weight that the engine has checked. It borrows the tensor's bytes."""

    def __init__(self, packed: Tensor) -> None:
        self.address = c_void_p()
        library = _library()
        self._close = library.sct_close
        message = library.sct_open(packed.data_ptr(), packed.numel(), byref(self.address))
        if message:
            raise DataError(f"a packed weight is damaged: {message.decode()}; pack the weight again")
        self.rows, self.cols = library.sct_rows(self.address), library.sct_cols(self.address)

    def __del__(self) -> None:
        if self.address:
            self._close(self.address)


def why_missing() -> str:
    """Why the engine cannot be used here; "" where it can."""
    try:
        _library()
    except TargetError as error:
        return str(error)
    return ""


def isa() -> str:
    """The instruction set in use: one of ISAS."""
    return str(_library().sct_isa().decode())


@contextmanager
def use(isa: str) -> Iterator[None]:
    """Inside, the kernels of another instruction set run; for tests and benchmarks, not for threads.

    Raises TargetError where this machine lacks it.
    """
    library = _library()
    before = library.sct_isa()
    if message := library.sct_use(isa.encode()):
        raise TargetError(f"instruction set {isa!r}: {message.decode()}")
    try:
        yield
    finally:
        library.sct_use(before)


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    quantize: bool = False,
) -> Tensor:
    """activation(x @ weight.T + bias + residual), for x (…, inputs) of float32 on the CPU.

    quantize: round activations to 8 bits, with a scale for each token, and add up integers; for int8 blocks of height 4
    only. csrc/quantized.cpp says exactly what is computed; without it int8 weights meet float32 activations.
    """
    return linears(x, [packed], [bias], [residual], [activation], [quantize])[0]


def linears(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    residual: Sequence[Tensor | None],
    activation: Sequence[str],
    quantize: Sequence[bool],
) -> list[Tensor]:
    """``linear`` for layers that read the same x, which is brought into the engine's order once."""
    handles = [opened(p) for p in packed]
    for handle in handles:
        if x.ndim == 0 or x.shape[-1] != handle.cols:
            raise DataError(f"the weight has {handle.cols} inputs, found activations of shape {list(x.shape)}")
    x = _plain("x", x)
    ys = [x.new_empty(*x.shape[:-1], handle.rows) for handle in handles]
    count, n = len(handles), x.shape[:-1].numel()
    finishes = (_Finish * count)()
    held = [
        _fill(finishes[i], bias[i], residual[i], activation[i], (handles[i].rows,), ys[i], quantize[i])
        for i in range(count)
    ]
    addresses = (c_void_p * count)(*(handle.address.value for handle in handles))
    outputs = (c_void_p * count)(*(y.data_ptr() for y in ys))
    stride = x.shape[-1]
    _check(_library().sct_linears(addresses, count, x.data_ptr(), n, stride, finishes, outputs))
    del held
    return ys


def conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    walk: Sequence[Sequence[int]],
) -> Tensor:
    """The same of a convolution: x (batch, channels, height, width); walk: kernel, stride, padding, dilation."""
    handle = opened(packed)
    images, size = _images(handle.cols, tuple(x.shape), *map(tuple, walk))
    x = _plain("x", x)
    y = x.new_empty(x.shape[0], handle.rows, *size)
    finish = _Finish()
    held = _fill(finish, bias, residual, activation, (handle.rows,), y)
    _check(_library().sct_conv(handle.address, x.data_ptr(), images, finish, y.data_ptr()))
    del held
    return y


def max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """The largest value under the kernel, NaN if there is one: x (batch, channels, height, width)."""
    if x.ndim != 4:
        raise DataError(f"expected activations of shape (batch, channels, height, width), found {list(x.shape)}")
    walk = (tuple(kernel), tuple(stride), tuple(padding), (1, 1))
    images, size = _images(x.shape[1] * kernel[0] * kernel[1], tuple(x.shape), *walk)
    x = _plain("x", x)
    y = x.new_empty(*x.shape[:2], *size)
    _check(_library().sct_max_pool(x.data_ptr(), images, torch.get_num_threads(), y.data_ptr()))
    return y


@functools.lru_cache(maxsize=1024)
def _images(cols: int, shape: tuple[int, ...], *walk: tuple[int, ...]) -> tuple[_Images, tuple[int, int]]:
    """What the engine is told of images, and the height and width of its output. Networks ask the same every time.

    Raises DataError where a weight with that many columns has no such convolution.
    """
    kernel, stride, padding, dilation = walk
    if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
        raise DataError(
            f"kernel, stride and dilation of a convolution are at least 1 and padding is not negative, found "
            f"{list(kernel)}, {list(stride)}, {list(dilation)} and {list(padding)}"
        )
    if len(shape) != 4 or shape[1] * kernel[0] * kernel[1] != cols:
        expected = f"(batch, {cols / (kernel[0] * kernel[1]):g}, height, width)"
        raise DataError(f"expected activations of shape {expected}, found {list(shape)}")
    size = image_size(shape[2:], *walk)
    if min(size) < 1:
        raise DataError(f"the kernel {list(kernel)} is larger than the padded image of {list(shape[2:])}")
    return _Images(*shape, *((c_int64 * 2)(*pair) for pair in walk)), size


def image_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width after a convolution."""
    first, second = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return first, second


def opened(packed: Tensor) -> Handle:
    """The handle of a packed weight, checked once for as long as its memory lives unchanged.

    Raises DataError where its bytes are no packed weight.
    """
    known = _handles.get(packed.data_ptr())
    version = 0 if packed.is_inference() else packed._version
    if known is not None and known[1] == version and known[2] == packed.numel() and not known[0].expired():
        return known[3]
    if packed.dtype != torch.uint8 or packed.ndim != 1 or not packed.is_contiguous() or not packed.is_cpu:
        raise DataError(
            f"a packed weight is a flat uint8 tensor on the CPU, found {packed.dtype} of shape {list(packed.shape)} "
            f"on {packed.device}"
        )
    handle = Handle(packed)
    with _lock:
        for address in [a for a, entry in _handles.items() if entry[0].expired()]:
            del _handles[address]
        _handles[packed.data_ptr()] = (_weak(packed.untyped_storage()), version, packed.numel(), handle)
    return handle


_weak: Any = reductions.StorageWeakRef
_handles: dict[int, tuple[Any, int, int, Handle]] = {}
_lock = threading.Lock()


def _plain(name: str, value: Tensor) -> Tensor:
    if value.dtype != torch.float32 or not value.is_cpu:
        raise DataError(f"the engine takes float32 on the CPU, found {name} of {value.dtype} on {value.device}")
    return value.contiguous()


def _fill(
    finish: _Finish, bias: Tensor | None, residual: Tensor | None, activation: str, rows: tuple[int, ...], y: Tensor,
    quantize: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Say what follows the product. Returns what must stay alive until it is done.

    Raises DataError where a tensor does not fit the output.
    """
    if activation not in ACTIVATIONS:
        raise DataError(f"activation {activation!r} is unknown; expected one of {sorted(ACTIVATIONS)}")
    finish.activation, finish.threads, finish.quantize = ACTIVATIONS[activation], torch.get_num_threads(), quantize
    held = []
    for name, value, shape in (("bias", bias, rows), ("residual", residual, y.shape)):
        if value is None:
            continue
        if value.shape != shape:
            raise DataError(f"expected {name} of shape {list(shape)}, found {list(value.shape)}")
        held.append(_plain(name, value))
        setattr(finish, name, held[-1].data_ptr())
    return held


def _check(message: bytes | None) -> None:
    if message:
        raise DataError(f"the engine refused: {message.decode()}")


@functools.cache
def _library() -> ctypes.CDLL:
    path = _path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise TargetError(f"the sparse engine in {path} cannot be loaded: {error}") from error
    messages = {
        "sct_open": (c_void_p, c_uint64, POINTER(c_void_p)),
        "sct_linears": (c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
        "sct_conv": (c_void_p, c_void_p, POINTER(_Images), POINTER(_Finish), c_void_p),
        "sct_max_pool": (c_void_p, POINTER(_Images), c_int32, c_void_p),
        "sct_isa": (),
        "sct_use": (c_char_p,),
    }
    for name, arguments in messages.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_char_p
    for name, kind in (("sct_rows", c_uint32), ("sct_cols", c_uint32), ("sct_close", None)):
        function = getattr(library, name)
        function.argtypes, function.restype = (c_void_p,), kind
    library.sct_share_threads.argtypes, library.sct_share_threads.restype = (c_void_p,), None
    if library.sct_version() != VERSION:
        raise TargetError(f"the sparse engine in {path} is of another version; install secateur again")
    _share_threads(library)
    if (wanted := os.environ.get(_ISA)) and (message := library.sct_use(wanted.encode())):
        raise TargetError(f"{_ISA}={wanted}: {message.decode()}")
    return library


def _path() -> Path:
    import secateur.runtime

    if _LIBRARY in os.environ:
        return Path(os.environ[_LIBRARY])
    for folder in secateur.runtime.__path__:
        for found in sorted(Path(folder).glob("libsecateur_kernels.*")):
            return found
    raise TargetError(
        "the sparse engine was not built when secateur was installed; with a C++ compiler (GCC or Clang) on this "
        "machine, run: pip install --force-reinstall --no-deps secateur"
    )


def _share_threads(library: ctypes.CDLL) -> None:
    """Let the engine run on torch's own threads, where torch brings the OpenMP runtime that GCC's programs use."""
    for runtime in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        library.sct_share_threads(ctypes.cast(ctypes.CDLL(str(runtime)).GOMP_parallel, c_void_p))
