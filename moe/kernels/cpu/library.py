"""The CPU kernels in C++: compiled for this machine when they are first wanted, kept, and told to XLA.

XLA's own products of a row or two pack the matrix anew each time, which costs more than the product. Where
there is no compiler nothing is lost but speed: whoever asks takes XLA's products then.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

SOURCE = Path(__file__).with_name("few_rows.cc")
TARGETS = ("switchyard_product", "switchyard_experts")
# Sums may be taken in any order; -ffast-math would also change how the whole process rounds tiny numbers.
FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-w", "-fno-math-errno", "-fassociative-math"]
FLAGS += ["-fno-signed-zeros", "-fno-trapping-math", "-march=native"]
FLAGS += ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []


@functools.cache
def ready() -> bool:
    """Whether the kernels can be called; compiles them where that was never done for this processor."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return _without("there is no C++ compiler")
    try:
        library = ctypes.cdll.LoadLibrary(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        return _without(f"{compiler} failed: {(error.stderr.strip() or 'no message').splitlines()[0]}")
    except OSError as error:
        return _without(str(error))
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return True


def _compiled(compiler: str) -> Path:
    """The library for this source, these flags, this processor and this JAX."""
    cores = Path("/proc/cpuinfo")
    first_core = cores.read_text().split("\n\n")[0].splitlines() if cores.exists() else []
    instructions = [line for line in first_core if line.startswith(("flags", "Features"))]
    what = [SOURCE.read_text(), compiler, *FLAGS, *instructions, platform.machine(), jax.__version__]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "switchyard"
    library = cache / f"{SOURCE.stem}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Under its name only when it is whole, since other processes may be about to load it.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / library.name
            command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(library)
    return library


def _without(reason: str) -> bool:
    print(f"CPU kernels are not compiled ({reason}): int8 generation is slower", file=sys.stderr)
    return False
