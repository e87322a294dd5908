"""`setup.py`: what it builds, what it says when it cannot, what comes out. Mostly with a stand-in compiler."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "bench", "docs", "tests", "*.egg-info", "__pycache__", "*.so", "runs"
)  # fmt: skip
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs from a source tree")

STAND_IN = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(arguments) + "\\n")
target = arguments[arguments.index("-o") + 1]
pathlib.Path(target).write_text("built")
if "-MF" in arguments:
    source = arguments[arguments.index("-c") + 1]
    header = pathlib.Path(source).with_name("cpu_kernels.h")
    pathlib.Path(arguments[arguments.index("-MF") + 1]).write_text(f"{{target}}: {{source}} {{header}}\\n")
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources with one extra Triton-side module."""
    copy = tmp_path / "tree"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT, symlinks=True)
    (copy / "vreflection" / "kernels").unlink(missing_ok=True)
    (copy / "kernels" / "probe_of_the_build.py").write_text("ANSWER = 42\n")
    return copy


@pytest.fixture
def compiler(tmp_path):
    """A compiler that writes down its calls and makes empty files."""
    script, log = tmp_path / "stand-in-c++", tmp_path / "calls.txt"
    script.write_text(STAND_IN.format(python=sys.executable, log=str(log)))
    script.chmod(0o755)
    log.touch()
    return script, log


def environment(**variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VREFLECTION_", "CXX", "MAX_JOBS", "TORCH_CUDA"))}
    return {**kept, "CUDA_HOME": "/nonexistent", "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}


def setup(tree, *command, before="", **variables):
    """Run setup.py as a command; `before` is Python that changes what it finds."""
    code = f"import sys, runpy; sys.argv = ['setup.py', *{list(command)!r}]\n{before}\nrunpy.run_path('setup.py')"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment(**variables), capture_output=True, text=True
    )


def lines(result):
    """Our own lines on stderr."""
    return [line for line in result.stderr.splitlines() if line.startswith("vreflection: ")]


def wheel_of(tree, tmp_path, **options):
    result = setup(tree, "-q", "bdist_wheel", "-d", str(tmp_path / "wheels"), **options)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    return wheel, zipfile.ZipFile(wheel).namelist(), result


NO_TORCH = (
    "import importlib.util as u, sysconfig, site; u.find_spec = lambda name, *a: None\n"
    "sysconfig.get_path = lambda *a, **k: '/nonexistent'; site.getusersitepackages = lambda: '/nonexistent'\n"
    "site.getsitepackages = lambda *a: []"
)
# pip's isolated build: torch cannot be imported, but the environment that pip runs in has it.
ISOLATED = (
    "import importlib.util as u; real = u.find_spec; u.find_spec = lambda n, *a: None if n == 'torch' else real(n, *a)"
)


@pytest.mark.parametrize(
    "reason,options",
    [
        ("VREFLECTION_SKIP_EXT is set", {"VREFLECTION_SKIP_EXT": "1"}),
        ("torch is not installed in this environment; pip install 'torch>=2.11'", {"before": NO_TORCH}),
        ("no C++ compiler (no-such-compiler)", {"CXX": "no-such-compiler"}),
        ("compiling _C.abi3.so failed", {"CXX": "false"}),
    ],
)
def test_without_a_build_the_wheel_is_pure_and_one_line_says_why(tree, tmp_path, reason, options):
    # A library left over from an earlier build must not slip into a wheel that says it has none.
    (tree / "vreflection" / "_C.abi3.so").write_text("stale")
    wheel, names, result = wheel_of(tree, tmp_path, **options)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]
    assert {"vreflection/__init__.py", "vreflection/kernels/probe_of_the_build.py"} <= set(names)
    assert "vreflection/configs/quickstart.yaml" in names
    said = [line for line in lines(result) if "C++ operators not built" in line]
    assert len(said) == 1 and reason in said[0] + result.stderr, result.stderr


@pytest.mark.parametrize("options", [{"before": NO_TORCH}, {"CXX": "no-such-compiler"}, {"CXX": "false"}])
def test_require_ext_makes_a_missing_build_an_error(tree, options):
    result = setup(tree, "-q", "build_ext", "--inplace", VREFLECTION_REQUIRE_EXT=1, **options)
    assert result.returncode != 0 and "VREFLECTION_REQUIRE_EXT is set" in result.stderr


@pytest.mark.parametrize("before", ["", ISOLATED], ids=["torch importable", "isolated build"])
def test_a_wheel_with_the_extension_says_so_in_its_tag(tree, tmp_path, compiler, before):
    wheel, names, result = wheel_of(tree, tmp_path, CXX=compiler[0], VREFLECTION_REQUIRE_EXT=1, before=before)
    assert re.search(r"-cp311-abi3-(linux|macosx)_\w+\.whl$", wheel.name), wheel.name
    assert [name for name in names if name.endswith(".so")] == ["vreflection/_C.abi3.so"]
    assert "vreflection/kernels/probe_of_the_build.py" in names and "vreflection/kernels/__init__.py" not in names
    assert not [name for name in names if name.startswith(("csrc", "kernels", "configs", "tests"))]
    assert [line for line in lines(result) if "CUDA code not built" in line and "no nvcc found" in line]


def test_only_what_changed_is_compiled_again(tree, compiler):
    script, log = compiler

    def build(**variables):
        log.write_text("")
        result = setup(tree, "-q", "build_ext", "--inplace", CXX=script, VREFLECTION_REQUIRE_EXT=1, **variables)
        assert result.returncode == 0, result.stderr
        assert (tree / "vreflection" / "_C.abi3.so").read_text() == "built"
        return [line for line in log.read_text().splitlines() if " -c " in line], log.read_text()

    sources = list((tree / "csrc").glob("*.cpp"))
    compiled, calls = build()
    assert len(compiled) == len(sources)
    assert "rpath" not in calls and "-ltorch_cpu" in calls
    assert build() == ([], "")
    (tree / "csrc" / "skinny_gemm.cpp").touch()
    compiled, _ = build()
    assert len(compiled) == 1 and "skinny_gemm.cpp" in compiled[0]
    (tree / "csrc" / "cpu_kernels.h").touch()
    assert len(build()[0]) == len(sources)
    compiled, _ = build(CXXFLAGS="-O1")
    assert len(compiled) == len(sources) and all("-O1" in line for line in compiled)


def test_without_ninja_the_compiler_is_called_directly(tree, compiler):
    script, log = compiler
    no_ninja = "import shutil; sys.modules['ninja'] = None; which = shutil.which\n"
    no_ninja += "shutil.which = lambda name, *a, **k: None if name == 'ninja' else which(name, *a, **k)"
    result = setup(tree, "-q", "build_ext", "--inplace", before=no_ninja, CXX=script, MAX_JOBS=1)
    assert result.returncode == 0 and (tree / "vreflection" / "_C.abi3.so").exists()
    assert "vreflection: ninja not found" in result.stderr
    assert len(log.read_text().splitlines()) == len(list((tree / "csrc").glob("*.cpp"))) + 1


def test_a_compiler_with_a_launcher_and_flags(tree, compiler):
    script, log = compiler
    result = setup(tree, "-q", "build_ext", "--inplace", CXX=f"env {script} -m64", VREFLECTION_REQUIRE_EXT=1)
    assert result.returncode == 0, result.stderr
    assert all("-m64" in call for call in log.read_text().splitlines())
    missing = setup(tree, "-q", "build_ext", "--inplace", CXX="env no-such-compiler -m64", VREFLECTION_REQUIRE_EXT=1)
    assert "no C++ compiler (env no-such-compiler -m64); install one or set CXX" in missing.stderr


def test_the_source_archive_holds_device_code(tree, tmp_path):
    result = setup(tree, "-q", "sdist", "-d", str(tmp_path / "sdist"), "--formats=gztar", before=NO_TORCH)
    assert result.returncode == 0, result.stderr
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for path in ("csrc/cpu_kernels.h", "csrc/regions.cpp", "csrc/measure_copy.cu", "kernels/probe_of_the_build.py"):
        assert path in names
    assert {"configs/quickstart.yaml", "setup.py", "pyproject.toml", "vreflection/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith(("bench", "build"))]


@pytest.fixture
def interpreter(tmp_path):
    """Python of a fresh environment that sees this one's packages, but not an installed vreflection."""
    import setuptools
    import torch

    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Paths alone: the .pth of an editable vreflection there is not followed.
    places = {str(Path(module.__file__).parents[1]) for module in (setuptools, torch)}
    (packages / "borrowed.pth").write_text("\n".join(places) + "\n")
    return folder / "bin" / "python"


def install(interpreter, *arguments, **variables):
    command = [sys.executable, "-m", "pip", "--python", interpreter, "install", "-q", "--no-build-isolation"]
    command += ["--no-deps", "--no-index", "--force-reinstall", "--ignore-installed", *arguments]
    result = subprocess.run(command, env=environment(**variables), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


CHECK_INSTALL = """
import importlib.util, vreflection, vreflection.kernels.probe_of_the_build as probe
assert probe.ANSWER == 42
print(vreflection.__file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("editable", [True, False], ids=["editable", "wheel"])
def test_kernels_import_from_an_install(tree, tmp_path, interpreter, compiler, editable):
    pytest.importorskip("pip")
    install(interpreter, *(["-e"] if editable else []), str(tree), CXX=compiler[0])
    result = subprocess.run(
        [interpreter, "-P", "-c", CHECK_INSTALL], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    home = Path(result.stdout.strip()).parent
    assert (home == tree / "vreflection") == editable
    assert (home / "_C.abi3.so").read_text() == "built"


def test_the_kernels_folder_shadows_no_other_package(tree, tmp_path):
    assert not (ROOT / "kernels" / "__init__.py").exists()
    other = tmp_path / "other" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("NAME = 'the other one'\n")
    code = "import kernels; print(kernels.NAME)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment(PYTHONPATH=other.parent), capture_output=True, text=True
    )
    assert result.stdout.strip() == "the other one", result.stderr


@pytest.mark.slow
def test_a_real_build_loads_and_computes(tree):
    pytest.importorskip("torch")
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    result = setup(tree, "-q", "build_ext", "--inplace", VREFLECTION_REQUIRE_EXT=1)
    assert result.returncode == 0, result.stderr
    code = "import torch, vreflection.ops.schemas; torch.ops.load_library('vreflection/_C.abi3.so')\n"
    code += "x = torch.ones(1, 2, 9); print(int(torch.ops.vreflection.skinny_nt(x, x).sum()))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment(), capture_output=True, text=True)
    assert ran.stdout.strip() == "36", ran.stderr


def cuda_inspector():
    found = importlib.util.find_spec("triton")
    bundled = Path(found.origin).parent / "backends/nvidia/bin/cuobjdump" if found else None
    return str(bundled) if bundled and bundled.exists() else shutil.which("cuobjdump")


@pytest.mark.slow
def test_cuda_code_compiles_for_the_architectures_asked_for(tree):
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("no nvcc")
    for source in (tree / "csrc").glob("*.cpp"):
        source.unlink()
    options = {"CUDA_HOME": Path(nvcc).resolve().parents[1], "TORCH_CUDA_ARCH_LIST": "8.0;9.0a+PTX"}
    result = setup(tree, "-q", "build_ext", "--inplace", VREFLECTION_REQUIRE_EXT=1, **options)
    assert result.returncode == 0, result.stderr
    if cuda_inspector() is None:
        pytest.skip("no cuobjdump to look inside")
    library = tree / "vreflection" / "_C_cuda.abi3.so"
    listed = [
        subprocess.run([cuda_inspector(), kind, library], capture_output=True, text=True).stdout
        for kind in ("--list-elf", "--list-ptx")
    ]
    assert "sm_80" in listed[0] and "sm_90a" in listed[0] and "sm_90a" in listed[1]


def test_a_bad_architecture_list_is_named(tree, compiler, tmp_path):
    fake = tmp_path / "cuda" / "bin"
    fake.mkdir(parents=True)
    shutil.copy(compiler[0], fake / "nvcc")
    options = {"CXX": compiler[0], "CUDA_HOME": fake.parent, "TORCH_CUDA_ARCH_LIST": "Hopper"}
    result = setup(tree, "-q", "build_ext", "--inplace", **options)
    assert result.returncode == 0 and "expected entries like 8.0, 9.0a or 9.0+PTX, got 'Hopper'" in result.stderr
    assert (tree / "vreflection" / "_C.abi3.so").exists() and not (tree / "vreflection" / "_C_cuda.abi3.so").exists()
