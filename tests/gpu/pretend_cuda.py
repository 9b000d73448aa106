"""Test aid: import first. Makes vLLM 0.26 choose its CUDA platform on a machine without a GPU, tensors on the CPU,
Triton kernels interpreted, so that the V2 model runner, the Triton attention backend and a plug-in's CUSTOM backend
run for real in everything but device code. No CUDA graphs, float16 only, tiny models only."""

import ctypes
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

os.environ.update(
    TRITON_INTERPRET="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_FLASHINFER_SAMPLER="0",
    CUDA_VISIBLE_DEVICES="",
)
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

# The interpreter puts its own functions into Triton's module while a kernel runs: one thread at a time.
_interpreting = threading.RLock()
_interpret = GridExecutor.__call__


def _one_at_a_time(self, *args, **kwargs):
    with _interpreting:
        return _interpret(self, *args, **kwargs)


GridExecutor.__call__ = _one_at_a_time

_convert_float = interpreter._convert_float


def _to_8_bits(values, source, target, rounding_mode):
    """The interpreter loses a carry from mantissa to exponent: of 1.99 it makes 1."""
    if target != tl.float8e4nv or source not in (tl.float16, tl.float32):
        return _convert_float(values, source, target, rounding_mode)
    numbers = torch.from_numpy(values).clamp(-448, 448)
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


interpreter._convert_float = _to_8_bits

_stub = Path(tempfile.mkdtemp()) / "libcuda.so.1"
subprocess.run(
    ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", _stub, Path(__file__).with_name("libcuda_stub.c")],
    check=True,
)
ctypes.CDLL(str(_stub), mode=ctypes.RTLD_GLOBAL)

import vllm  # noqa: E402
import vllm.third_party.pynvml as nvml  # noqa: E402


class _Memory:
    total, free, used = 150754820096, 150754820096, 0


nvml.nvmlInit = nvml.nvmlShutdown = lambda *a: None
nvml.nvmlDeviceGetCount = lambda *a: 1
nvml.nvmlDeviceGetHandleByIndex = lambda i: i
nvml.nvmlDeviceGetCudaComputeCapability = lambda h: (9, 0)
nvml.nvmlDeviceGetName = lambda h: "NVIDIA H200"
nvml.nvmlDeviceGetUUID = lambda h: "GPU-0"
nvml.nvmlDeviceGetMemoryInfo = lambda h: _Memory

import vllm.platforms as platforms  # noqa: E402
import vllm.platforms.cuda as cuda  # noqa: E402

cuda.CudaPlatform = cuda.NvmlCudaPlatform
platforms._current_platform = cuda.NvmlCudaPlatform()
cuda.NvmlCudaPlatform.device_id_to_physical_device_id = classmethod(lambda cls, i: i)
cuda.CudaPlatformBase.dispatch_key = cuda.NvmlCudaPlatform.dispatch_key = "CPU"
for _p in (cuda.NvmlCudaPlatform, cuda.CudaPlatformBase):
    _p.get_current_memory_usage = classmethod(lambda cls, d=None: 0)

import vllm.v1.worker.cpu.shm  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.v1.worker import gpu_worker  # noqa: E402

CPU = torch.device("cpu")


def _unpinned(make):
    def made(*args, **kwargs):
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return made


for _name in ("zeros", "empty", "tensor", "ones", "full", "zeros_like", "empty_like"):
    setattr(torch, _name, _unpinned(getattr(torch, _name)))


class _Properties:
    multi_processor_count, total_memory, major, minor, name = 132, 150 << 30, 9, 0, "NVIDIA H200"


class _Nothing:
    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False


torch.cuda.graph_pool_handle = lambda *a: None
torch.cuda.get_device_properties = lambda *a: _Properties
torch.cuda.current_device = lambda: 0
torch.cuda.mem_get_info = lambda *a: (_Memory.free, _Memory.total)
torch.cuda.synchronize = lambda *a: None
torch.cuda.stream = _Nothing
torch.accelerator.current_device_index = lambda: 0


def _init_device(self):
    self.device, self.parallel_config = CPU, self.vllm_config.parallel_config
    gpu_worker.init_worker_distributed_environment(
        self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
    )
    gpu_worker.init_workspace_manager(CPU, 1)
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    self.model_runner = GPUModelRunner(self.vllm_config, CPU)


gpu_worker.Worker.init_device = _init_device
gpu_worker.Worker.determine_available_memory = lambda self: 1 << 28


def _load_model(self, *, load_dummy_weights=False):
    with set_current_vllm_config(self.vllm_config):
        self.model_runner.load_model(load_dummy_weights=load_dummy_weights)


gpu_worker.Worker.load_model = _load_model
gpu_worker.Worker._maybe_get_memory_pool_context = lambda self, tag: _Nothing()

import vllm._custom_ops  # noqa: E402, F401
import vllm.v1.worker.gpu.sample.sampler as sampler  # noqa: E402

sampler.gumbel_sample = lambda logits, *a, **k: logits.argmax(-1)


def _rms_norm(out, x, weight, epsilon):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    out.copy_((wide * (weight.float() if weight is not None else 1)).to(out.dtype))


def _fused_add_rms_norm(x, residual, weight, epsilon):
    residual.add_(x)
    _rms_norm(x, residual, weight, epsilon)


_ops = torch.library.Library("_C", "IMPL")
_ops.impl("rms_norm", _rms_norm, "CPU")
_ops.impl("fused_add_rms_norm", _fused_add_rms_norm, "CPU")

from vllm.engine.arg_utils import EngineArgs  # noqa: E402

_create = EngineArgs.create_engine_config


def _on_cpu(self, *args, **kwargs):
    config = _create(self, *args, **kwargs)
    config.device_config.device, config.device_config.device_type = CPU, "cpu"
    config.compilation_config.custom_ops = ["none"]
    return config


EngineArgs.create_engine_config = _on_cpu
print(
    "pretend_cuda: platform",
    type(platforms._current_platform).__name__,
    "python",
    sys.version.split()[0],
    file=sys.stderr,
)
