"""What a module of CuPy really has, where the NVIDIA library that it is linked with is too large to have here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from availability import skip_off_linux
from cuda_emulator import build

# {name: a number, or the docstring; of a class its methods as well}
CODE = """import json
from cupy.cuda import {name} as module
assert getattr(module, "available", True), "lib{name} is missing"
found = {{n: v for n, v in vars(module).items() if n[0] != "_"}}
classes = {{n: v for n, v in found.items() if isinstance(v, type)}}
found |= {{f"{{n}}.{{m}}": v for n, kind in classes.items() for m, v in vars(kind).items() if m[0] != "_"}}
print(json.dumps({{n: v if isinstance(v, int) else v.__doc__ or "" for n, v in found.items()}}))
"""


def described(name: str, folder: Path) -> dict:
    """{name: its value, or its docstring, whose first line is its signature} of cupy.cuda.<name>.

    Where the module's library is missing it is given one that has the functions by name, and they do nothing: what
    CuPy's own module holds shows. That its file contains a name proves nothing: debug information has names of the C
    header that Python never sees.
    """
    words = [sys.executable, "-W", "ignore", "-c", CODE.format(name=name)]
    real = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if real.returncode == 0:
        return json.loads(real.stdout)
    assert f"lib{name}" in real.stderr, real.stderr
    skip_off_linux()
    import cupy_backends

    (module,) = Path(cupy_backends.__file__).parent.glob(f"cuda/libs/{name}.*")
    functions = sorted(set(re.findall(rb"\x00(%s[A-Z]\w+)\x00" % name.encode(), module.read_bytes())))
    (folder / "stub.c").write_text("".join(f"void {function.decode()}(void) {{}}\n" for function in functions))
    # what CuPy looks for, and what its module is linked with
    for soname in set(re.findall(rf"lib{name}\w*\.so\.\d+", real.stderr + module.read_bytes().decode("latin-1"))):
        options = ["-xc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", folder / soname]
        subprocess.run([build.COMPILER, *options, folder / "stub.c"], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
