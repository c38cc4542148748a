"""kernels.cu compiled by the system's C++ compiler and run by a loop over all threads, so that the CUDA source itself is tested."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from cdiff.runtime.device.compiler import SOURCE
from cdiff.runtime.device.kernels import SIGNATURES

SHIM = r"""
#include <cmath>
#include <cstring>
#include <utility>
#define __device__
#define __global__
#define __forceinline__ inline
#undef __noinline__
#define __noinline__ __attribute__((noinline))
struct Three { unsigned x, y, z; };
static Three blockIdx, threadIdx, blockDim, gridDim;
static inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
static inline unsigned atomicMin(unsigned *at, unsigned value) {
    unsigned old = *at;
    if (value < old) *at = value;
    return old;
}
#include SOURCE
template <class... A, std::size_t... I>
static void once(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A> *)arguments[I]...);
}
template <class... A>
static void all(void (*kernel)(A...), unsigned gx, unsigned gy, unsigned bx, void **arguments) {
    gridDim = {gx, gy, 1};
    blockDim = {bx, 1, 1};
    for (unsigned y = 0; y < gy; ++y)
        for (unsigned x = 0; x < gx; ++x)
            for (unsigned i = 0; i < bx; ++i) {
                blockIdx = {x, y, 0};
                threadIdx = {i, 0, 0};
                once(kernel, arguments, std::index_sequence_for<A...>{});
            }
}
extern "C" void host_philox(u64 *word, u64 key) { philox(word, key); }
#define LAUNCH(name) \
    extern "C" void launch_##name(unsigned gx, unsigned gy, unsigned bx, void **arguments) { all(name, gx, gy, bx, arguments); }
"""
LETTERS = {"P": ctypes.c_uint64, "Q": ctypes.c_uint64, "i": ctypes.c_int}


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="cdiff-kernels-"))
    text = SHIM + "\n".join(f"LAUNCH({name})" for name in SIGNATURES)
    (folder / "kernels.cpp").write_text(text)
    # The kernels are compiled without contraction on the GPU too.
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", f'-DSOURCE="{SOURCE}"']
    out = folder / "kernels.so"
    done = subprocess.run(
        [compiler, *flags, "-o", str(out), str(folder / "kernels.cpp")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(out))
    shutil.rmtree(folder)  # it stays mapped
    return loaded


def library() -> ctypes.CDLL:
    """The compiled source. Skips the test where there is no C++ compiler."""
    found = _library()
    if found is None:
        pytest.skip("no C++ compiler (g++) on this machine to run the CUDA source with")
    return found


def philox(counter: tuple[int, int, int, int], key: int) -> list[int]:
    """The four words of one Philox block, by the source's own function."""
    words = (ctypes.c_uint64 * 4)(*counter)
    library().host_philox(words, ctypes.c_uint64(key))
    return list(words)


def launch(name: str, grid: tuple[int, int], threads: int, *arguments: int) -> None:
    """Run one kernel over host memory, its arguments as in `SIGNATURES`."""
    types = SIGNATURES[name]
    assert len(arguments) == len(types), f"{name} takes {len(types)} arguments"
    values: list[Any] = [LETTERS[letter](value) for letter, value in zip(types, arguments, strict=True)]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    getattr(library(), f"launch_{name}")(*map(ctypes.c_uint, (*grid, threads)), pointers)
