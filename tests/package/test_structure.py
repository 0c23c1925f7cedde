"""The house keeps its order: imports without cycles, short files, one word for one thing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fused_res"
PRODUCT = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")])
PRODUCT = [path for path in PRODUCT if PACKAGE / "kernels" not in path.parents]
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))
MOST_LINES, MOST_LINES_OF_FUNCTION = 600, 60
LONGER: dict[str, str] = {}  # path or function -> why it is longer; at most five

# house words: each of these has another name now
OLD_WORDS = {
    "ends", "stamp", "watch", "holds", "folds", "parts", "parted", "choices", "measured", "tuned",
    "sheets", "ours",
}  # fmt: skip


def name_of(path: Path) -> str:
    folder = PACKAGE if PACKAGE in path.parents else ROOT
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(part for part in ("fused_res", *parts) if part != "__init__")


MODULES = {name_of(path): path for path in PRODUCT}


def imported(name: str) -> set[str]:
    """The modules of the package that one imports, inside functions too."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            inside = {f"{module}.{alias.name}" for alias in node.names}
            found |= inside if inside <= MODULES.keys() else inside | {module}
    # the package's own file imports everything, and everything is in it
    return {module for module in found if module in MODULES} - {name, "fused_res"}


def test_no_import_leads_back():
    imports = {name: imported(name) for name in MODULES}
    assert sum(map(len, imports.values())) > 100
    while imports:
        last = {name for name, of in imports.items() if not of & imports.keys()}
        assert last, f"these import each other: {sorted(imports)}"
        imports = {name: of for name, of in imports.items() if name not in last}


def test_the_command_of_each_name_is_a_module():
    from fused_res.cli import COMMANDS

    assert {module for module, _ in COMMANDS.values()} <= MODULES.keys()


def test_each_module_can_be_imported_first():
    """Each in a process of its own, forked from one that has imported torch."""
    code = """if True:
        import importlib, os, sys, traceback
        import torch
        for name in sys.argv[1:]:
            if (child := os.fork()) == 0:
                try:
                    importlib.import_module(name)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                sys.exit(f"{name} cannot be imported first")
    """
    names = MODULES.keys() - {"fused_res.__main__"}  # which runs the command
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted(names)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without its docstring."""
    lines, first = function.end_lineno - function.lineno + 1, function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def functions(path: Path) -> dict[str, int]:
    """Lines of each function, by name or by the first line of it."""
    if path.suffix == ".py":
        kinds = ast.FunctionDef, ast.AsyncFunctionDef
        nodes = ast.walk(ast.parse(path.read_text()))
        return {node.name: code_lines(node) for node in nodes if isinstance(node, kinds)}
    # clang-format puts the first and last lines of functions, and no others, at the margin
    other = re.compile(
        r"(namespace|struct|class|enum|union|using|typedef|extern|#|//|public|private)"
    )
    found, start = {}, None
    for i, line in enumerate(path.read_text().splitlines()):
        code = line.partition("//")[0].rstrip()
        if start is None and re.match(r"[A-Za-z_]", code) and not other.match(code):
            start = i, code
        if start is not None and code.startswith("}"):
            found[start[1]] = i - start[0] + 1
        if code.startswith("}") or code.endswith(";"):
            start = None if not code.startswith(" ") else start
    return found


@pytest.mark.parametrize("path", [*PRODUCT, *BENCHMARKS, *NATIVE], ids=lambda path: path.name)
def test_files_and_functions_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES or path.name in LONGER, f"{lines} lines"
    long = {name: n for name, n in functions(path).items() if n > MOST_LINES_OF_FUNCTION}
    assert not long.keys() - LONGER.keys()


def test_exceptions_are_few():
    assert len(LONGER) <= 5


def defined(path: Path) -> set[str]:
    """The names that a file gives to things."""
    found = {path.stem}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias) and node.asname:
            found.add(node.asname)
    return found


@pytest.mark.parametrize("path", [*PRODUCT, *BENCHMARKS], ids=lambda path: path.name)
def test_things_have_one_name(path):
    words = {name: set(re.findall("[a-z]+", name.lower())) for name in defined(path)}
    assert not [name for name, of in words.items() if of & OLD_WORDS]


def test_contributing_says_where_things_are():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## Where things are")[2].partition("\n## ")[0]
    words = re.findall(r"`([\w/.<>]+(?:/|\.(?:py|cpp|cuh?|h)))`", section)
    paths = {word.rstrip("/") for word in words}
    there = {path.name for path in ROOT.glob("*/**/*")}
    assert len(paths) > 40
    for path in paths:
        if "<op>" in path:
            assert list(ROOT.glob(path.replace("<op>", "*")) or PACKAGE.glob(path)), path
        else:
            assert (ROOT / path).exists() or Path(path).name in there, path
