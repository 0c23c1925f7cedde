"""The documentation: its code runs, its commands are understood, its links lead somewhere.

Each ```python block of docs/ runs in a namespace of its own, so that each can be pasted into a file
(test_build.py runs the README's); what it prints must be the ```text block after it, where there
is one. A block that begins with the name of a file (# train_ddp.py) is what the page's commands
run: torchrun is started, commands of the package are parsed by their own parsers (other tests run
them), of the rest targets, extras and variables must exist.
"""

import argparse
import ast
import doctest
import functools
import importlib
import inspect
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import model_libraries  # noqa: F401  torchvision, before a page imports it
import pytest
import torch

import fused_res
from fused_res import cli, env, models, reference
from fused_res.ops import bn_act, conv_bn_act, res_block, res_chain, sync_bn_act

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXTRAS = "accelerate", "pytorch_lightning"


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    prints: str | None

    @property
    def file(self) -> str | None:
        """The name of the file that it is."""
        found = re.match(r"# (\w+\.py)\n", self.code)
        return found and found[1]


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(), []
    for match in re.finditer(r"```(\w+)\n(.*?)```(?:\s+```text\n(.*?)```)?", text, flags=re.S):
        line = text[: match.start()].count("\n") + 1
        found.append(Block(page, line, *match.groups()))
    return found


def of(language: str) -> list:
    every = [b for page in PAGES for b in blocks(page) if b.language == language]
    return [pytest.param(b, id=f"{b.page.name}:{b.line}") for b in every if not b.file]


@pytest.mark.parametrize("block", of("python"))
def test_python_runs(block, one_thread, tmp_path, monkeypatch, capsys):
    for name in EXTRAS:
        if re.search(rf"^(import|from) {name}\b", block.code, re.M):
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    # captured whole as ever; Inductor's C++ compiler alone would take ten seconds
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    code = compile("\n" * block.line + block.code, str(block.page), "exec")
    capsys.readouterr()
    exec(code, {"__name__": "__main__"})
    if block.prints is not None:
        assert capsys.readouterr().out == block.prints


def parse(argv, monkeypatch):
    module = importlib.import_module(cli.COMMANDS[argv[0]][0])
    monkeypatch.setattr(module, "run", lambda args: 0)
    assert cli.main(argv) == 0


def start(words, page, folder, monkeypatch):
    """torchrun: of the package, parsed; of a file that is on the page, run."""
    from torch.distributed.run import parse_args

    args = parse_args(words)
    if args.module:
        assert args.training_script == "fused_res"
        return parse(args.training_script_args, monkeypatch)
    files = {b.file: b.code for b in blocks(page) if b.file}
    # Python's shutdown may race with gloo's threads: pytorch#117762
    leave = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    (folder / args.training_script).write_text(files[args.training_script] + leave)
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("process ") == int(args.nproc_per_node)


@pytest.mark.parametrize("block", of("sh"))
def test_commands_are_understood(block, tmp_path, monkeypatch):
    pyproject = (ROOT / "pyproject.toml").read_text()
    lines = re.sub(r"cat > \S+ <<'(\w+)'\n.*?\n\1\n", "", block.code, flags=re.S)
    for line in lines.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"FUSED_RES_\w+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            assert name in variables()
            env.read({name: value})
        if words[:3] == ["python", "-m", "fused_res"]:
            words[:3] = ["fused-res"]
        match words:
            case []:
                continue
            case ["fused-res", *argv]:
                parse(argv, monkeypatch)
            case ["torchrun", *rest]:
                start(rest, block.page, tmp_path, monkeypatch)
            case ["make", target, *_]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), line
            case ["pip", "install", *names]:
                for extra in re.findall(r"(?:fused_res|\.)\[(\w+)\]", " ".join(names)):
                    assert re.search(rf"^{extra} = \[", pyproject, re.M), line
            case ["python", script] if script.endswith(".py"):
                continue  # the reader's own
            case _:
                pytest.fail(f"{block.page.name}: what is {line!r}?")


def rows(page: Path, title: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    text = page.read_text().split(f"\n## {title}\n")[1]
    table = re.search(r"^\| ---.*\n((?:\|.*\n)+)", text, re.M)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[1].splitlines()]


def marked(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def variables() -> list[str]:
    return [f"FUSED_RES_{field.upper()}" for field in env.Settings._fields]


def test_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text()
    for name in set(fused_res.__all__) - {"__version__", "reference"}:
        assert re.search(rf"(::: |`)fused_res\.{name}\b", text), name


def test_reference_has_every_variable_and_its_values():
    table = rows(DOCS / "api.md", "Environment variables")
    found = {marked(name)[0]: marked(values) for name, values, _ in table}
    assert list(found) == variables()
    for name, values in {
        "FUSED_RES_BACKEND": env.BACKENDS,
        "FUSED_RES_CPU_ISA": env.CPU_ISAS,
        "FUSED_RES_LOG": env.LOGS,
        "FUSED_RES_WINOGRAD": env.WINOGRADS,
    }.items():
        assert tuple(found[name]) == values


def test_reference_has_every_command_and_its_flags():
    found = {marked(row[0])[0]: row[1:] for row in rows(DOCS / "api.md", "Commands")}
    assert list(found) == list(cli.COMMANDS)
    for name, (module, summary) in cli.COMMANDS.items():
        assert found[name][0] == summary
        if name == "train":  # has a page
            continue
        parser = argparse.ArgumentParser(add_help=False)
        importlib.import_module(module).add_arguments(parser)
        flags = [flag for action in parser._actions for flag in action.option_strings]
        assert marked(" ".join(found[name][1:])) == flags, name


@functools.cache
def messages() -> list[str]:
    """Every string of the package, values in it as …"""
    found = []
    for path in (ROOT / "fused_res").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TROUBLE = DOCS / "troubleshooting.md"


@pytest.mark.parametrize("title", ["What the report says", "Errors"])
def test_messages_are_those_of_the_package(title):
    for message, _ in rows(TROUBLE, title):
        (words,) = marked(message)
        pattern = ".*".join(re.escape(part.strip()) for part in words.split("…"))
        assert any(re.search(pattern, known, re.S) for known in messages()), words


def test_links_lead_to_files():
    """As they are, so that the pages can be read without being built too; mkdocs checks anchors."""
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)#]+)", prose):
            if "://" not in target:
                assert (DOCS / target).is_file(), f"{page.name}: {target}"


def test_pictures_are_well_formed():
    for path in (DOCS / "images").glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_site_builds_and_needs_no_network(tmp_path, monkeypatch):
    for name in ("material", "mkdocstrings"):
        pytest.importorskip(name)
    commands = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    def refuse(*_):
        raise AssertionError("the site must be built without the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
    config.plugins.on_startup(command="build", dirty=False)
    commands.build(config)
    for path in tmp_path.rglob("*.html"):
        html = path.read_text()
        fetched = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?:[^\">\s]*)", html)
        assert not fetched, path
    assert "ResNet-50 batch 16" in (tmp_path / "performance.html").read_text()
    assert (tmp_path / "search/search_index.js").exists()  # of pages that are opened as files


OPS = [
    bn_act.bn_act,
    conv_bn_act.conv_bn_act,
    res_block.res_block,
    res_chain.res_chain,
    sync_bn_act.sync_bn_act,
]
PUBLIC = [getattr(module, name) for module in (fused_res, reference) for name in vars(module)]
PUBLIC = {
    thing.__qualname__: thing
    for thing in [*PUBLIC, *OPS, models.create, models.names, models.describe]
    if (inspect.isclass(thing) or inspect.isfunction(thing))
    and (thing.__module__ or "").startswith("fused_res")
    and not thing.__name__.startswith("_")
}
WITHOUT = {"all_gather", "all_reduce", "TuneReport", "BackendUnavailable", "TableNotWritten"}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_show_what_is_true(name):
    """An example in each, which runs and returns what it says."""
    names = {**vars(reference), **vars(sys.modules[PUBLIC[name].__module__])}
    names |= {"torch": torch, "nn": torch.nn, "fused_res": fused_res}
    found = doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__ or "", names, name, None, 0)
    assert bool(found.examples) != (name in WITHOUT)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    said = []
    result = doctest.DocTestRunner(optionflags=flags).run(found, out=said.append)
    assert not result.failed, "".join(said)
