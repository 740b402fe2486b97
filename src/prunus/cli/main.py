"""The command line: `prunus demo | run | methods | inspect | bench`."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout

from rich.console import Console

from prunus import __version__
from prunus.cli import benchmark, commands
from prunus.errors import PrunusError


class Printer(Console):
    """The console of results. Rich would end the process when a reader such as `head` leaves."""

    def on_broken_pipe(self) -> None:
        """Leave it to main."""
        raise BrokenPipeError


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="prunus", description="Sparse neural networks on the CPUs that people have."
    )
    top.add_argument("--version", action="version", version=f"prunus {__version__}")
    kinds = top.add_subparsers(dest="command", required=True, metavar="command")

    demo = kinds.add_parser("demo", help="train, prune, pack, run and measure on real digits")
    demo.add_argument("--seeds", type=_count, default=1, help="how many seeds (default 1)")
    demo.add_argument("--folder", default="prunus-demo", help="where packed files go")
    demo.add_argument("--report", default="prunus-report.html", help="the page to write")
    demo.set_defaults(action=commands.demo)

    run = kinds.add_parser("run", help="do the same for your own model and data, from a recipe")
    run.add_argument("recipe", help="YAML file; see docs/recipes.md")
    run.set_defaults(action=commands.run)

    methods = kinds.add_parser("methods", help="list methods, scores, structures and the rest")
    methods.set_defaults(action=commands.list_methods)

    inspect = kinds.add_parser("inspect", help="check a packed file and show what it holds")
    inspect.add_argument("file")
    inspect.set_defaults(action=commands.inspect)

    bench = kinds.add_parser("bench", help="measure a packed file against dense torch")
    bench.add_argument("file")
    bench.add_argument("--batch", type=_counts, default=[1, 64], help="batch sizes (default 1,64)")
    bench.add_argument("--threads", type=_count, default=1, help="threads (default 1)")
    bench.add_argument("--model", help="package.module:function that builds the network")
    bench.add_argument(
        "--input", type=_counts, help="with --model: shape of one example, as in 1,8,8"
    )
    bench.set_defaults(action=benchmark.bench)

    for kind in (demo, run, methods, inspect, bench):
        kind.add_argument("--json", action="store_true", help="print JSON and nothing else")
        kind.add_argument("--quiet", action="store_true", help="no progress, results only")
    return top


def _count(text: str) -> int:
    """Read a whole number from 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _counts(text: str) -> list[int]:
    """Read whole numbers from 1, separated by commas."""
    return [_count(part.strip()) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, 1 for an error that prunus explains, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    arguments.command_line = shlex.join(["prunus", *argv])
    try:
        return _run(arguments)
    except PrunusError as error:
        return _explain(str(error))
    except BrokenPipeError:  # the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return _explain(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        _explain("interrupted; the files that were written are whole")
        return 130


def _run(arguments: argparse.Namespace) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # units such as µs in a terminal without them
    # What a user's own model or data prints is no result.
    with redirect_stdout(sys.stderr):
        action: Callable[[argparse.Namespace], commands.Result] = arguments.action
        result = action(arguments)
    if arguments.json:
        print(json.dumps(result.values))
    else:
        result.show(Printer())
    sys.stdout.flush()
    return 0


def _explain(message: str) -> int:
    print(f"prunus: {message}", file=sys.stderr)
    return 1
