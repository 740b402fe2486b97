"""Write the tables of the documentation anew from the results beside the benchmarks.

python benchmarks/tables.py docs/performance.md docs/quality.md

A table stands between two comments. The first says what it shows, paths below benchmarks/:
<!-- ratios FILE by KEY ... --> time of each peer / time of prunus, geometric means of the groups
<!-- times FILE --> medians in milliseconds, a row per case
<!-- accuracy FILE NETWORK --> mean, deviation and number of seeds, a column per sparsity
<!-- rows FILE COLUMN ... --> these columns of every row
<!-- machine FILE --> machine, versions, commit and command of a results file
<!-- end -->
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import harness

HERE = Path(__file__).parent
OURS = "prunus"
BLOCK = re.compile(
    r"(<!-- (ratios|times|accuracy|rows|machine) ([^>]*?) -->\n).*?(<!-- end -->)", re.S
)
MEASURED = (
    "gflops_on_nonzeros", "share_of_limit", "sparse_layers", "layers", "commit", "load", "layout",
)  # fmt: skip
"""Parts of a case that do not say what the case is."""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def cases(file: str) -> list[dict[str, Any]]:
    return json.loads((HERE / file).read_text())["cases"]


def peers(found: list[dict[str, Any]]) -> list[str]:
    """All that was measured beside prunus, in the order of first appearance."""
    names = dict.fromkeys(name for case in found for name in case["seconds"])
    return [name for name in names if name != OURS]


def ratios(file: str, *words: str) -> str:
    """How many times longer each peer takes; above 1 prunus is faster."""
    keys, found = words[1:], cases(file)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for case in found:
        groups.setdefault(tuple(case[key] for key in keys), []).append(case["seconds"])
    names, lines = peers(found), []
    for group in sorted(groups):
        cells = []
        for name in names:
            both = [s[name]["median"] / s[OURS]["median"] for s in groups[group] if name in s]
            cells.append(f"{harness.geometric_mean(both):.2f}" if both else "–")
        lines.append([*(f"{value}" for value in group), *cells])
    return markdown([*keys, *names], lines)


def times(file: str) -> str:
    found = cases(file)
    names = [OURS, *peers(found)]
    keys = [
        k for k, v in found[0].items() if k not in MEASURED and isinstance(v, int | float | str)
    ]
    lines = []
    for case in found:
        medians = {name: 1000 * case["seconds"][name]["median"] for name in case["seconds"]}
        best = min(medians.values())
        cells = [
            "–"
            if name not in medians
            else "**" * (medians[name] == best)
            + f"{medians[name]:.3g}"
            + "**" * (medians[name] == best)
            for name in names
        ]
        lines.append(
            [
                *(
                    f"{case[key]:.4g}" if isinstance(case[key], float) else str(case[key])
                    for key in keys
                ),
                *cells,
            ]
        )
    return markdown([*keys, *names], lines)


def read(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / file).read_text().splitlines()]


def accuracy(file: str, network: str) -> str:
    found = [row for row in read(file) if row["network"] == network]
    sparsities = sorted({row["sparsity"] for row in found} - {0.0})
    means: dict[str, list[str]] = {}
    order: dict[str, float] = {}
    for name in dict.fromkeys(row["method"] for row in found):
        cells, last = [], []
        for sparsity in sparsities:
            points = [
                100 * row["accuracy"]
                for row in found
                if row["method"] == name and row["sparsity"] in (sparsity, 0.0)
            ]
            last = points or last
            cells.append(
                f"{fmean(points):.2f} ± {pstdev(points):.2f} ({len(points)})" if points else "–"
            )
        means[name], order[name] = cells, fmean(last)
    names = sorted(means, key=lambda name: -order[name])
    header = ["method", *(f"{100 * sparsity:g}%" for sparsity in sparsities)]
    return markdown(header, [[f"`{name}`", *means[name]] for name in names])


def rows(file: str, *columns: str) -> str:
    return markdown(columns, [[str(row.get(c, "–")) for c in columns] for row in read(file)])


def machine(file: str) -> str:
    content = json.loads((HERE / file).read_text())
    host, versions = content["machine"], content["versions"]
    named = ", ".join(f"{k} {v}" for k, v in versions.items() if v != "not installed")
    cases = content.get("cases", [])
    commits = dict.fromkeys(case["commit"] for case in cases if "commit" in case)
    commit = ", ".join(commits or [content["commit"]])
    return (
        f"`{content['command']}`, {content['date']}, commit {commit}, "
        f"{host['processor']}, {host['cores']} cores ({host['kernels']}), "
        f"{content['threads']} thread(s); {named}.\n"
    )


TABLES: dict[str, Callable[..., str]] = {
    "ratios": ratios,
    "times": times,
    "accuracy": accuracy,
    "rows": rows,
    "machine": machine,
}


def refreshed(text: str) -> str:
    """The text with every table built anew from its results."""

    def build(match: re.Match[str]) -> str:
        start, kind, words, end = match.groups()
        return f"{start}\n{TABLES[kind](*words.split())}\n{end}"

    return BLOCK.sub(build, text)


def main() -> None:
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(refreshed(page.read_text()))


if __name__ == "__main__":
    main()
