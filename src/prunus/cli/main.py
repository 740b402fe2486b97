"""The command line: `prunus demo | run | methods | inspect | bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from prunus import __version__
from prunus.cli import commands
from prunus.errors import PrunusError


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

    inspect = kinds.add_parser("inspect", help="show what a packed file holds")
    inspect.add_argument("file")
    inspect.set_defaults(action=commands.inspect)

    bench = kinds.add_parser("bench", help="measure a packed file against dense torch")
    bench.add_argument("file")
    bench.add_argument("--batch", default="1,64", help="batch sizes (default 1,64)")
    bench.add_argument("--threads", type=_count, default=1, help="threads (default 1)")
    bench.add_argument("--model", help="package.module:function that builds the network")
    bench.add_argument("--input", help="shape of one example, with --model, as in 1,8,8")
    bench.set_defaults(action=commands.bench)

    for kind in (demo, run, methods, inspect, bench):
        kind.add_argument("--json", action="store_true", help="print JSON and nothing else")
        kind.add_argument("--quiet", action="store_true", help="no progress bar, results only")
    return top


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, 1 for an error that prunus explains, 130 when interrupted."""
    arguments = parser().parse_args(argv)
    try:
        arguments.action(arguments)
        sys.stdout.flush()
    except PrunusError as error:
        print(f"prunus: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"prunus: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prunus: interrupted; files already written are whole", file=sys.stderr)
        return 130
    return 0
