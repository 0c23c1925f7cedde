"""The ``fused-res`` command, also ``python -m fused_res``: finds a command's module and runs it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence

import torch

from ..dispatch.backends import BackendUnavailable
from ..version import __version__

# name -> (module with add_arguments(parser) and run(args) -> exit code, summary). A call imports
# only the module of its command.
COMMANDS = {
    "doctor": ("fused_res.cli.doctor", "say what is installed, what runs where, and why"),
    "check": ("fused_res.cli.check", "test every available backend against float64"),
    "tune": (
        "fused_res.cli.tune",
        "measure which kernels run a model's inference fastest here",
    ),
    "train": ("fused_res.train", "train a model, fused, plain or both"),
    "evaluate": ("fused_res.train.evaluate", "say how good a trained model is"),
    "demo": ("fused_res.demo", "train two plain PyTorch nets beside their fused twins"),
}


class CommandError(Exception):
    """An error that the user can fix; printed as one line, without a traceback."""

    code = 1


class UsageError(CommandError):
    """The command was called wrongly."""

    code = 2


def table(header: Sequence[str], rows: Sequence[Sequence[object]], right: str = "") -> str:
    """Aligned columns, one line a row.

    Args:
        header: a title for each column.
        rows: the cells; ``str`` makes them text.
        right: a letter for each column, ``r`` to align it to the right; default: none.
    """
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = right.ljust(len(widths))
    lines = [
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(line, widths, sides, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Runs the body with ``count`` threads of PyTorch; None: with as many as before."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _one_line(error: Exception) -> str:
    """The error's text in one line, without control characters."""
    text = " ".join(str(error).splitlines())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; default: the process's arguments.

    Returns:
        The exit code: 0, or 1 if the command failed. Wrong usage exits with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fused-res", description="Fused residual blocks for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"fused_res {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {}
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if name in argv:
            modules[name] = importlib.import_module(module)
            modules[name].add_arguments(sub)
    args = parser.parse_args(argv)
    try:
        return modules[args.command].run(args)
    except (CommandError, BackendUnavailable, OSError) as error:
        print(f"fused-res {args.command}: error: {_one_line(error)}", file=sys.stderr)
        return error.code if isinstance(error, CommandError) else 1
    except KeyboardInterrupt:
        print(f"fused-res {args.command}: interrupted", file=sys.stderr)
        return 130
