"""What is compiled for a GPU machine beforehand, and taken there if its versions are the same:
``python benchmarks/device/prepared.py`` (``make gpu-prepare``).

A folder has the libraries, Triton's cache and ``versions.json``. They are independent: what does
not build, or does not fit the machine, leaves the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu-prepared"
VERSIONS, LIBRARIES, CACHE = "versions.json", "libraries", "triton"
MOST_MIB = 60  # of the tree and the folder together: what travels to a machine
KERNELS = ".cubin", ".json"  # of Triton's cache; the rest is for reading


# --- what is here


def source() -> str:
    """A hash of all that the libraries are built from."""
    paths = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    content = [path.read_bytes() for path in [ROOT / "setup.py", *paths]]
    return hashlib.sha256(b"".join(content)).hexdigest()


def triton_versions(capability: int) -> dict[str, str | None]:
    """Version, and a hash of all that is in the key of every compilation."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend
        from triton.runtime.cache import triton_key

        key = triton_key() + make_backend(GPUTarget("cuda", capability, 32)).hash()
    except Exception as error:  # there are many ways in which Triton may be absent
        return {"triton": None, "triton_key": f"{type(error).__name__}: {error}"}
    key = hashlib.sha256(key.encode()).hexdigest()
    return {"triton": triton.__version__, "triton_key": key}


def facts(arch: str | None = None) -> dict[str, str | None]:
    """Of this machine; ``arch``: default: the GPU's, for example ``9.0a``."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        arch = arch or f"{major}.{minor}" + "a" * (major >= 9)
    found = {"gpu": gpu, "arch": arch, "python": ".".join(map(str, sys.version_info[:2]))}
    found |= {"torch": torch.__version__.partition("+")[0], "cuda": torch.version.cuda}
    return found | triton_versions(capability(arch or "9.0a"))


def capability(arch: str) -> int:
    """90 for ``9.0a``."""
    return int("".join(re.findall(r"\d+", arch)))


# --- what of a folder can be used


def why_not(prepared: dict, here: dict) -> dict[str, str | None]:
    """Why the libraries and Triton's cache are not for this machine; None where they are."""

    def unlike(*names: str) -> str | None:
        words = [
            f"{name} {prepared.get(name)} was prepared, {here.get(name)} is here"
            for name in names
            if prepared.get(name) != here.get(name)
        ]
        return "; ".join(words) or None

    libraries = unlike("arch", "torch")
    if prepared.get("source") != here.get("source"):
        libraries = "its sources have changed"
    cache = unlike("triton", "arch") or unlike("triton_key")
    failed = prepared.get("failed", {})
    return {LIBRARIES: failed.get(LIBRARIES) or libraries, CACHE: failed.get(CACHE) or cache}


def read(folder: Path) -> dict | None:
    """The versions of a folder; None where there is none that can be read."""
    try:
        found = json.loads((folder / VERSIONS).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def take(folder: Path, here: dict, package: Path, cache: Path) -> dict[str, str | None]:
    """Copies libraries to ``package`` and compiled kernels to ``cache``, where they are for this
    machine; why not, as ``why_not``."""
    prepared = read(folder)
    if prepared is None:
        words = f"nothing was prepared in {folder}"
        return {LIBRARIES: words, CACHE: words}
    reasons = why_not(prepared, here)
    if reasons[LIBRARIES] is None:
        for path in (folder / LIBRARIES).glob("*.so"):
            scratch = package / f"{path.name}.part"  # a process may have the old one open
            shutil.copy(path, scratch)
            os.replace(scratch, package / path.name)
    if reasons[CACHE] is None:
        shutil.copytree(folder / CACHE, cache, dirs_exist_ok=True)
        move_groups(cache)
    return reasons


def move_groups(cache: Path) -> None:
    """Triton lists the files of a compilation by their full paths: writes those of today."""
    for path in cache.glob("*/__grp__*.json"):
        names = json.loads(path.read_text())["child_paths"]
        there = {name: str(path.parent / name) for name in names if (path.parent / name).exists()}
        path.write_text(json.dumps({"child_paths": there}))


# --- preparing


def build_libraries(folder: Path, arch: str) -> None:
    """Both, for one architecture.

    Raises:
        OSError, subprocess.CalledProcessError: a compiler is not here or fails.
    """
    work = ROOT / "build" / "gpu-libraries"
    environ = {**os.environ, "FUSED_RES_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(work / "lib"),
               "--build-temp", str(work / "temp")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env=environ, check=True)
    folder.mkdir(parents=True)
    for path in (work / "lib" / "fused_res").glob("*.so"):
        shutil.copy(path, folder)


def fill_cache(folder: Path, arch: str) -> None:
    """Compiles Triton's kernels; ``launches.py`` says which.

    Raises:
        OSError, subprocess.CalledProcessError: some do not compile.
    """
    environ = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    environ["PYTHONPATH"] = str(ROOT)
    environ.pop("TRITON_INTERPRET", None)
    script = str(Path(__file__).with_name("launches.py"))
    command = [sys.executable, script, "--arch", str(capability(arch))]
    try:
        subprocess.run(command, cwd=ROOT, env=environ, check=True)
    finally:
        trim(folder)


def trim(cache: Path) -> None:
    """Removes what is not loaded."""
    for path in cache.glob("*/*"):
        if path.suffix not in (*KERNELS, ".so"):
            path.unlink()
    move_groups(cache)


def mebibytes(folder: Path) -> float:
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    return sum(path.stat().st_size for path in paths) / 2**20


def tree_mebibytes() -> float:
    """Of the files that git would carry."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    paths = [ROOT / os.fsdecode(name) for name in set(names) if name]
    return sum(path.lstat().st_size for path in paths if path.is_file()) / 2**20


def why_too_large(tree: float, folder: float, most: float = MOST_MIB) -> str | None:
    """Of MiB."""
    if tree + folder < most:
        return None
    return f"the tree has {tree:.1f} MiB and the folder {folder:.1f}, {most:.0f} at most travel"


def prepare(folder: Path, arch: str) -> dict[str, str]:
    """Fills a folder, which is emptied first; why a step failed, by its name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    failed = {}
    for name, step in {CACHE: fill_cache, LIBRARIES: build_libraries}.items():
        try:
            step(folder / name, arch)
        except (OSError, subprocess.CalledProcessError) as error:
            failed[name] = f"it did not build: {error}"
            print(f"{name}: {failed[name]}", file=sys.stderr, flush=True)
    found = {**facts(arch), "source": source(), "failed": failed}
    (folder / VERSIONS).write_text(json.dumps(found, indent=1) + "\n")
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--arch", default="9.0a", help="of the GPU, as in TORCH_CUDA_ARCH_LIST")
    add("--out", type=Path, default=FOLDER, help="the folder, emptied first")
    add("--facts", action="store_true", help="print this machine's versions and do nothing")
    args = parser.parse_args(argv)
    if args.facts:
        print(json.dumps({**facts(), "source": source()}))
        return 0
    failed = prepare(args.out, args.arch)
    tree, folder = tree_mebibytes(), mebibytes(args.out)
    count = sum(path.is_file() for path in args.out.rglob("*"))
    print(f"{args.out}: {folder:.1f} MiB in {count} files; the tree has {tree:.1f} MiB")
    large = why_too_large(tree, folder)
    if large:
        print(large, file=sys.stderr)
    return 1 if failed or large else 0


if __name__ == "__main__":
    sys.exit(main())
