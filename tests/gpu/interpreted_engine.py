"""`tests.e2e.offline_engine` with vLLM's GPU build on a CPU, its kernels interpreted.

`python -m tests.gpu.interpreted_engine SPEC.json RESULT.json`
"""

import sys

import tests.gpu.pretend_cuda  # noqa: F401  before vLLM, and before Triton is imported by anything
from stream_monitor.engine import register
from tests.e2e.offline_engine import main

if __name__ == "__main__":
    register()  # vLLM would, if the distribution were installed beside it
    main(*sys.argv[1:])
