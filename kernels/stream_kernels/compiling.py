"""How loops are compiled, and where their machine code is kept between starts.

numba keys its disk cache by the file of the cached function alone, and writes a new index before the new code: an edit
of a callee in another file, or a crash between the two, leaves code that no longer is what the sources say. Here the
names of the cache's files carry a hash of all sources of the function's folder and of this file, which is why such a
folder imports nothing else of ours. Only the function that is called from Python is cached: its code contains that of
all its callees.
"""

import hashlib
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering

log = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


@register_pass(mutates_CFG=True, analysis_only=False)
class _CalleeLowering(NativeLowering):  # type: ignore[misc]
    """Lowering of a function that only compiled code calls.

    numba optimises every function together with all it calls, on each level of callers anew, and gives it machine code
    and a wrapper for Python. Here callees stay intermediate code, which is optimised once, in the function that Python
    calls: a third of the time.

    Nor do callees count references to arrays: a view of a row of a table costs two locked instructions else, and most
    loops are over such views. All arrays are lent by the caller for the whole call. None may be made (numba then says
    "NRT required but not enabled"; to assign one array to another makes one), and none that was lent may be returned
    to a function that Python calls, which would count it down.
    """

    _name = "stream_kernels_callee_lowering"

    def run_pass(self, state: Any) -> bool:
        library = state.library = state.targetctx.codegen().create_library(state.func_id.func_qualname)
        library._optimize_final_module = lambda: None
        library._finalize_final_module = lambda: setattr(library, "_finalized", True)
        state.flags.no_cpython_wrapper = state.flags.no_cfunc_wrapper = True
        state.targetctx = state.targetctx.subtarget(enable_nrt=False)
        # The machine code also is the object that stands for the function. Any built-in one will do; this one raises a
        # KeyError, should the function be called from Python after all.
        with patch.object(state.targetctx, "get_executable", lambda *_: {}.popitem):
            return bool(super().run_pass(state))


class _CalleeCompiler(CompilerBase):  # type: ignore[misc]
    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state, "stream_kernels_callee")
        passes.passes = [(_CalleeLowering if step is NativeLowering else step, text) for step, text in passes.passes]
        passes._finalized = False
        passes.finalize()
        return [passes]


def jit(**options: Any) -> Callable[[Function], Function]:
    """The decorator of every function that compiled code calls. `options` are those of `numba.njit`."""
    decorator: Callable[[Function], Function] = numba.njit(
        nogil=True, error_model="numpy", pipeline_class=_CalleeCompiler, **options
    )
    return decorator


def cached_jit() -> Callable[[Callable[..., Any]], Any]:
    """The decorator of a function that Python calls: compiled once per installation, or at each start where no cache
    folder can be written ($NUMBA_CACHE_DIR, `__pycache__` beside it and the user's own are tried) and none was compiled
    beside it before."""
    return _cached(nogil=True)


def checked_jit() -> Callable[[Callable[..., Any]], Any]:
    """The same of a function that takes microseconds, for which it is not worth to let go of the interpreter, and whose
    numbers come from others: an index beyond an array raises, as in Python."""
    return _cached(boundscheck=True)


def _cached(**options: bool) -> Callable[[Callable[..., Any]], Any]:
    def decorated(function: Callable[..., Any]) -> Any:
        dispatcher: Any = numba.njit(error_model="numpy", **options)(function)
        try:
            # There is no public way to choose the class; `Dispatcher.enable_caching` is this line with numba's own.
            dispatcher._cache = _Cache(function)
        except RuntimeError as error:
            log.warning("%s is compiled anew at every start: %s", function.__name__, error)
        return dispatcher

    return decorated


def source_hash(folder: Path) -> str:
    """Hash of all sources of a folder and of this file, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in (*sorted(folder.glob("*.py")), Path(__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


_GIVEN, _BESIDE, *_ELSEWHERE = CompileResultCacheImpl._locator_classes


class _BuiltIn(_BESIDE):  # type: ignore[misc, valid-type]
    """`__pycache__` beside the source that cannot be written, and need not be: an image has compiled it."""

    def ensure_cache_path(self) -> None:
        sources = source_hash(Path(self._py_file).parent)
        if not any(Path(self.get_cache_path()).glob(f"*-{sources}-*.nbi")):
            raise FileNotFoundError(self.get_cache_path())


class _CacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_GIVEN, _BESIDE, _BuiltIn, *_ELSEWHERE)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.sources = source_hash(Path(inspect.getfile(function)).parent)
        super().__init__(function)

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        return str(super().get_filename_base(f"{fullname}-{self.sources}", abiflags))


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's disk cache, with names of our own; a cache that cannot be read or written costs time, nothing else."""

    _impl_class = _CacheImpl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # a truncated file raises whatever its bytes happen to mean
            log.warning("Compiled code in %s cannot be read, it is compiled anew: %r", self.cache_path, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
            function, sources, _ = self._impl.filename_base.partition(self._impl.sources)
            for path in Path(self.cache_path).glob(f"{function}*"):
                if not path.name.startswith(function + sources):
                    path.unlink(missing_ok=True)  # of sources that are no more
        except OSError as error:
            log.warning("Compiled code cannot be kept in %s, the next start compiles anew: %s", self.cache_path, error)
