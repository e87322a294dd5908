"""Packages outside `vreflection/`, and the build of the C++ and CUDA operators. The rest is in pyproject.toml.

The extension is optional: without torch or a compiler, or with `VREFLECTION_SKIP_EXT=1`, the package installs as pure
Python and says so in one line. `VREFLECTION_REQUIRE_EXT=1` turns a missing or failing build into an error. Also
read: `CXX`, `CXXFLAGS`, `CUDA_HOME`, `TORCH_CUDA_ARCH_LIST`, `MAX_JOBS`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup

if int(setuptools.__version__.partition(".")[0]) < 77:  # met without build isolation only
    sys.exit(
        f"vreflection's build expects setuptools 77 or newer, got {setuptools.__version__}: pip install -U setuptools"
    )
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)
# Stable ABI of torch 2.11: one binary for that version and every later one.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DNDEBUG"]
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]
# Error messages name files: relative to the source, whatever machine built them.
CXX_FLAGS += [f"-ffile-prefix-map={ROOT}/="]
# The CUDA part speaks to torch's C shim for the current stream; nvcc 13 has no target below 7.5.
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
NVCC_FLAGS += [f"-Xcompiler=-ffile-prefix-map={ROOT}/="]
DEFAULT_ARCHS = "8.0;9.0a;9.0+PTX"
HOW_TO = "pip install 'torch>=2.11', then pip install --no-build-isolation --no-deps --force-reinstall <this package>"


class CannotBuild(Exception):
    """The extension cannot be built here; the message says why."""


def flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no")


def say(message: str) -> None:
    print(f"vreflection: {message}", file=sys.stderr, flush=True)


def find_torch() -> Path:
    """Folder of torch: importable, or, inside pip's isolated build, installed in the environment that runs pip."""
    found = find_spec("torch")
    candidates = [Path(found.origin).parent] if found and found.origin else []
    roots = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    roots += [site.getusersitepackages(), *getattr(site, "getsitepackages", list)()]
    candidates += [Path(root) / "torch" for root in roots]
    for folder in candidates:
        version_file = folder / "version.py"
        if not version_file.exists():
            continue
        version = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text())
        if version and (int(version[1]), int(version[2])) >= MIN_TORCH:
            if (folder / "include/torch/csrc/stable/library.h").exists():
                return folder
            raise CannotBuild(f"torch in {folder} has no stable C++ headers")
        raise CannotBuild(f"torch in {folder} is older than 2.11; {HOW_TO}")
    raise CannotBuild(f"torch is not installed in this environment; {HOW_TO}")


def find_compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(split_compiler(command)[0]):
            return command
    raise CannotBuild(f"no C++ compiler ({' '.join(chosen) or 'g++, c++, clang++'}); install one or set CXX")


def split_compiler(command: list[str]) -> tuple[str, list[str]]:
    """The compiler in a command such as `ccache g++ -m64`, and its flags."""
    words = next((number for number, word in enumerate(command) if word.startswith("-")), len(command))
    return command[words - 1] if words else "", command[words:]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((str(place) for place in places if place and Path(place).exists()), None)


def find_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def arch_flags(archs: str) -> list[str]:
    """nvcc flags for a list such as `8.0;9.0a;9.0+PTX`."""
    flags = []
    for arch in re.split(r"[;,\s]+", archs.strip()):
        matched = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", arch)
        if not matched:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 9.0+PTX, got {arch!r}")
        number = matched[1] + matched[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if matched[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def job_count() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


class Build:
    """Compile commands of one shared library, run by ninja (which skips what is up to date) or one after another."""

    def __init__(self, folder: Path, output: Path, rules: dict[str, list[str]], sources: list[Path], link: list[str]):
        self.folder, self.output, self.link = folder, output, link
        self.objects = {folder / f"{source.name}.o": source for source in sources}
        self.rules = rules

    def compile_command(self, rule: str, source: str, target: str) -> list[str]:
        return [*self.rules[rule], "-c", source, "-o", target]

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        ninja = find_ninja()
        try:
            if ninja:
                self.run_ninja(ninja)
            else:
                say("ninja not found: compiling without it, nothing is skipped")
                self.run_plain()
        except subprocess.CalledProcessError as error:
            output = (error.stdout or "").strip()
            raise CannotBuild(f"compiling {self.output.name} failed:\n{output[-4000:]}") from error

    def run_plain(self) -> None:
        def compile_one(item: tuple[Path, Path]) -> None:
            execute(self.compile_command(item[1].suffix[1:], str(item[1]), str(item[0])))

        with ThreadPoolExecutor(job_count()) as pool:
            list(pool.map(compile_one, self.objects.items()))
        execute([*self.link, "-o", str(self.output), *map(str, self.objects)])

    def run_ninja(self, ninja: str) -> None:
        lines = ["ninja_required_version = 1.3"]
        for rule in self.rules:
            command = shlex.join([*self.rules[rule], "-MMD", "-MF"]) + " $out.d -c $in -o $out"
            lines += [f"rule {rule}", f"  command = {command}", "  depfile = $out.d", "  deps = gcc"]
        lines += ["rule link", f"  command = {shlex.join(self.link)} -o $out $in"]
        for target, source in self.objects.items():
            lines.append(f"build {escape(target)}: {source.suffix[1:]} {escape(source)}")
        lines.append(f"build {escape(self.output)}: link {' '.join(map(escape, self.objects))}")
        (self.folder / "build.ninja").write_text("\n".join(lines) + "\n")
        execute([ninja, "-C", str(self.folder), "-j", str(job_count())])


def escape(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


def execute(command: list[str]) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if flag("VREFLECTION_VERBOSE_BUILD") or (result.returncode == 0 and "warning:" in result.stdout):
        print(result.stdout)
    result.check_returncode()


def cpu_build(folder: Path) -> Build:
    if sys.platform != "linux" and sys.platform != "darwin":
        raise CannotBuild(f"no build for {sys.platform} yet")
    torch, compiler = find_torch(), find_compiler()
    flags = [*CXX_FLAGS, *DEFINES, "-isystem", str(torch / "include"), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    # No rpath: the process has loaded torch, and with it these libraries, before it loads the extension.
    link = [*compiler, "-shared", f"-L{torch / 'lib'}"]
    link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--no-as-needed", "-ltorch_cpu"]
    sources = sorted((ROOT / "csrc").glob("*.cpp"))
    return Build(folder / "cpu", folder / "cpu/_C.abi3.so", {"cpp": [*compiler, *flags]}, sources, link)


def cuda_build(folder: Path) -> Build:
    torch, compiler, nvcc = find_torch(), find_compiler(), find_nvcc()
    if nvcc is None:
        raise CannotBuild("no nvcc found (CUDA_HOME, PATH); Triton kernels need none")
    archs = arch_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
    program, host_flags = split_compiler(compiler)
    base = [
        nvcc,
        *(["-ccbin", program, *(f"-Xcompiler={flag}" for flag in host_flags)] if os.environ.get("CXX") else []),
    ]
    flags = [*NVCC_FLAGS, *DEFINES, *archs, "-isystem", str(torch / "include")]
    link = [*base, *archs, "-shared", f"-L{torch / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch_cpu"]
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    return Build(folder / "cuda", folder / "cuda/_C_cuda.abi3.so", {"cu": [*base, *flags]}, sources, link)


class BuildDeviceCode(build_ext):
    """Builds what can be built here; an extension that cannot is dropped with one line that says why."""

    def build_extensions(self) -> None:
        folder = ROOT / "build" / "device_code"
        if not os.access(ROOT, os.W_OK):
            folder = Path(self.build_temp).resolve()
        for extension in list(self.extensions):
            is_cuda = extension.name.endswith("_cuda")
            target = Path(self.get_ext_fullpath(extension.name))
            try:
                build = (cuda_build if is_cuda else cpu_build)(folder)
                build.run()
            except CannotBuild as error:
                what = "CUDA code" if is_cuda else "C++ operators"
                if flag("VREFLECTION_REQUIRE_EXT") and not (is_cuda and find_nvcc() is None):
                    raise SystemExit(
                        f"vreflection: {what} not built, and VREFLECTION_REQUIRE_EXT is set: {error}"
                    ) from None
                say(f"{what} not built, the package works without: {error}")
                self.extensions.remove(extension)
                self.remove_stale(target)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file, not new content: a process that has loaded the old one keeps it whole.
            shutil.copy2(build.output, f"{target}.new")
            os.replace(f"{target}.new", target)

    @staticmethod
    def remove_stale(target: Path) -> None:
        target.unlink(missing_ok=True)


class BuildPython(build_py):
    """An editable install finds `vreflection.kernels` through a link.

    setuptools' own hook serves a folder without `__init__.py` at the top level only, and `kernels/` must have none: a
    regular package of that name in the working directory would shadow another library.
    """

    def run(self) -> None:
        link = ROOT / "vreflection" / "kernels"
        if self.editable_mode and not link.is_dir():
            try:
                link.unlink(missing_ok=True)
                link.symlink_to(Path("..") / "kernels", target_is_directory=True)
            except OSError as error:
                say(f"no link {link} to ../kernels ({error}): Triton kernels are not found in this editable install")
        super().run()


class TaggedWheel(bdist_wheel):
    """Builds the extension first, so that the wheel's tag says what is in it."""

    def finalize_options(self) -> None:
        if self.distribution.has_ext_modules():
            self.py_limited_api = "cp311"
        super().finalize_options()

    def run(self) -> None:
        if self.distribution.has_ext_modules():
            self.run_command("build_ext")
            self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def extensions() -> list[Extension]:
    if flag("VREFLECTION_SKIP_EXT"):
        say("C++ operators not built: VREFLECTION_SKIP_EXT is set")
        return []
    found = []
    for name, pattern in (("_C", "*.cpp"), ("_C_cuda", "*.cu")):
        sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))
        if sources:
            found.append(Extension(f"vreflection.{name}", sources, py_limited_api=True))
    return found


setup(
    packages=[*find_packages(include=["vreflection", "vreflection.*"]), "vreflection.configs", "vreflection.kernels"],
    package_dir={"vreflection.configs": "configs", "vreflection.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildDeviceCode, "build_py": BuildPython, "bdist_wheel": TaggedWheel},
)
