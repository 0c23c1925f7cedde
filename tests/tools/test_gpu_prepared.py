"""What ``make gpu-prepare`` compiles is taken on a machine with the same versions, only there."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

prepared = importlib.import_module("device.prepared")
LAUNCHES = str(Path(__file__).with_name("prepared_launches.py"))
HERE = {"gpu": "NVIDIA X", "arch": "9.0a", "python": "3.12", "torch": "2.11.0", "cuda": "13.0",
        "triton": "3.6.0", "triton_key": "k", "source": "s"}  # fmt: skip
LIBRARIES, CACHE = prepared.LIBRARIES, prepared.CACHE


@pytest.fixture
def folder(tmp_path):
    """A prepared folder, of two libraries and a compilation."""
    folder = tmp_path / "prepared"
    (folder / LIBRARIES).mkdir(parents=True)
    for name in ("_C.abi3.so", "_C_cuda.abi3.so"):
        (folder / LIBRARIES / name).write_text(f"new {name}")
    (folder / CACHE / "KEY").mkdir(parents=True)
    (folder / CACHE / "KEY" / "k.cubin").write_text("code")
    group = {"child_paths": {name: f"/elsewhere/KEY/{name}" for name in ("k.cubin", "k.ttir")}}
    (folder / CACHE / "KEY" / "__grp__k.json").write_text(json.dumps(group))
    (folder / prepared.VERSIONS).write_text(json.dumps({**HERE, "gpu": None, "failed": {}}))
    return folder


@pytest.fixture
def take(folder, tmp_path):
    package, cache = tmp_path / "package", tmp_path / "cache"
    package.mkdir()
    (package / "_C_cuda.abi3.so").write_text("old")

    def take(**changes):
        reasons = prepared.take(folder, {**HERE, **changes}, package, cache)
        taken = (package / "_C_cuda.abi3.so").read_text().startswith("new"), cache.exists()
        return reasons, taken

    return take


def test_the_same_versions_are_taken(take, tmp_path):
    reasons, taken = take()
    assert reasons == {LIBRARIES: None, CACHE: None} and taken == (True, True)
    assert (tmp_path / "package" / "_C.abi3.so").exists()
    key = tmp_path / "cache" / "KEY"
    group = json.loads((key / "__grp__k.json").read_text())
    assert group == {"child_paths": {"k.cubin": str(key / "k.cubin")}}


@pytest.mark.parametrize(
    "changes, taken, words",
    [
        ({"torch": "2.12.0"}, (False, True), "torch 2.11.0 was prepared, 2.12.0 is here"),
        ({"arch": "10.0a"}, (False, False), "arch 9.0a was prepared, 10.0a is here"),
        ({"source": "t"}, (False, True), "its sources have changed"),
        ({"triton": "3.9.0"}, (True, False), "triton 3.6.0 was prepared, 3.9.0 is here"),
        ({"triton_key": "l"}, (True, False), "triton_key k was prepared, l is here"),
        ({"triton": None}, (True, False), "None is here"),
        ({"python": "3.13"}, (True, True), None),  # neither depends on it
    ],
)
def test_other_versions_are_not_taken(take, changes, taken, words):
    reasons, found = take(**changes)
    assert found == taken
    assert words is None or any(words in str(reason) for reason in reasons.values())


def test_what_did_not_build_is_not_taken(take, folder):
    versions = {**HERE, "failed": {LIBRARIES: "it did not build: nvcc"}}
    (folder / prepared.VERSIONS).write_text(json.dumps(versions))
    reasons, taken = take()
    assert reasons[LIBRARIES] == "it did not build: nvcc" and taken == (False, True)


@pytest.mark.parametrize("text", [None, "garbage", "[]"])
def test_a_folder_that_cannot_be_read_is_not_taken(take, folder, text):
    path = folder / prepared.VERSIONS
    path.unlink() if text is None else path.write_text(text)
    reasons, taken = take()
    assert taken == (False, False) and "nothing was prepared" in reasons[CACHE]


def test_a_step_that_fails_leaves_the_other(tmp_path, monkeypatch):
    def fails(folder, arch):
        raise subprocess.CalledProcessError(1, ["nvcc"])

    monkeypatch.setattr(prepared, "build_libraries", fails)
    monkeypatch.setattr(prepared, "fill_cache", lambda folder, arch: (folder / "KEY").mkdir(
        parents=True))  # fmt: skip
    out = tmp_path / "out"
    (out / "old").mkdir(parents=True)
    assert prepared.main(["--out", str(out), "--arch", "9.0a"]) == 1
    versions = prepared.read(out)
    assert "nvcc" in versions["failed"][LIBRARIES] and CACHE not in versions["failed"]
    assert versions["arch"] == "9.0a" and versions["source"] == prepared.source()
    assert (out / CACHE / "KEY").exists() and not (out / "old").exists()


def test_what_is_too_large_fails(tmp_path, monkeypatch, capsys):
    assert prepared.why_too_large(20.0, 39.0) is None
    assert "at most travel" in prepared.why_too_large(20.0, 41.0)

    def large(folder, arch):
        folder.mkdir()
        (folder / "a.so").write_bytes(bytes(2**20))

    monkeypatch.setattr(prepared, "build_libraries", large)
    monkeypatch.setattr(prepared, "fill_cache", lambda folder, arch: None)
    monkeypatch.setattr(prepared, "tree_mebibytes", lambda: 58.0)
    assert prepared.main(["--out", str(tmp_path / "out")]) == 0
    monkeypatch.setattr(prepared, "tree_mebibytes", lambda: 59.5)
    assert prepared.main(["--out", str(tmp_path / "out")]) == 1
    assert "the tree has 59.5 MiB and the folder 1.0, 60 at most travel" in capsys.readouterr().err


def test_the_tree_can_travel_with_what_is_prepared():
    """A folder for one architecture has 35 MiB."""
    if shutil.which("git") is None or not (prepared.ROOT / ".git").exists():
        pytest.skip("no git")
    assert 1 < prepared.tree_mebibytes() < prepared.MOST_MIB - 35


def test_facts_of_a_machine_are_json():
    command = [sys.executable, prepared.__file__, "--facts"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert set(HERE) == set(found), done.stderr
    assert found["source"] == prepared.source()


def launches(what, capability, cache):
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    done = subprocess.run([sys.executable, LAUNCHES, what, str(capability)], env=environ,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability, stages", [(80, 3), (90, 1), (100, 1)])
def test_old_tritons_launches_have_the_stages_of_the_device(monkeypatch, capability, stages):
    """Stages are in the key of a compilation."""
    launches = importlib.import_module("device.launches")
    monkeypatch.setattr(launches.conv_tiles, "VERSION", (3, 6))
    config = next(c for c in launches.conv_tiles.CONFIGS if c.kind == "pointer" and c.stages == 3)
    with launches.on_device(capability):
        assert launches.conv_tiles.stages(config, torch.device("meta")) == stages


def test_a_device_finds_what_was_compiled_without_one(tmp_path):
    """Its launches come to the same keys, in another folder too; what is not there is compiled."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("no Triton")
    launches("fill", 90, tmp_path / "prepared")
    prepared.trim(tmp_path / "prepared")
    assert not list((tmp_path / "prepared").glob("*/*.source"))
    cache = tmp_path / "cache"
    shutil.copytree(tmp_path / "prepared", cache)
    shutil.rmtree(tmp_path / "prepared")
    prepared.move_groups(cache)
    count = len(list(cache.glob("*/*.cubin")))
    assert count > 5
    shutil.rmtree(next(cache.glob("*/_bn_act*.cubin")).parent)
    found = launches("few", 90, cache)
    assert (found["taken"], found["compiled"]) == (count - 1, 1)
    assert found["launched"] >= count


@pytest.mark.parametrize("installed", [False, True])
def test_a_dry_run_takes_libraries_that_it_lacks(folder, tmp_path, installed):
    gpu, package = importlib.import_module("gpu"), tmp_path / "package"
    package.mkdir()
    if installed:
        (package / "_C.abi3.so").write_text("old")
    here = {**HERE, "gpu": None, "arch": None}
    reasons = gpu.take(folder, here, tmp_path / "cache", package)
    assert reasons == ({} if installed else {LIBRARIES: None, CACHE: None})
    text = (package / "_C.abi3.so").read_text()
    assert text == ("old" if installed else "new _C.abi3.so")
