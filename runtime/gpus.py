"""The NVIDIA GPUs that this process may use, as the driver itself lists them, so that no CUDA package is needed."""

from __future__ import annotations

import ctypes

from cdiff.runtime.engines.trt import Gpu

DRIVER = "libcuda.so.1"
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR (CUDA driver API, cuda.h)."""


def visible_gpus() -> list[Gpu]:
    """The GPUs in CUDA's order, without those that CUDA_VISIBLE_DEVICES hides; empty where there is no driver or no GPU.

    Their `free_bytes` is the total memory: only inside a context can the free part be known. Raises nothing.
    """
    try:
        cuda = ctypes.CDLL(DRIVER)
        count = ctypes.c_int()
        if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
            return []
        return [_gpu(cuda, number) for number in range(count.value)]
    except (OSError, AttributeError):  # no driver, or one older than these functions
        return []


def _gpu(cuda: ctypes.CDLL, number: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), number)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (MAJOR, MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode(errors="replace"), f"{capability[0]}.{capability[1]}", memory.value)
