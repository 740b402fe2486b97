"""Write the tables of the documentation anew from the results beside the benchmarks.

python benchmarks/tables.py docs/performance.md docs/quality.md docs/methods.md

A table stands between two comments; one whose results are not there yet stays as it is. The first
comment says what it shows, paths below benchmarks/:
<!-- ratios FILE by KEY ... --> time of each peer / time of prunus, geometric means of the groups
<!-- times FILE --> medians in milliseconds, a row per case
<!-- accuracy FILE NETWORK --> mean, deviation and number of seeds, a column per sparsity
<!-- steps FILE --> a training step and an epoch: dense, masked, packed; time and memory
<!-- difference FILE MODEL EPOCHS --> packed and masked accuracy, the mean of packed minus masked
over the same seeds and its 95% confidence interval
<!-- structures FILE NAME ... --> structured layers: share of the peak, gain over dense peers
<!-- forms FILE --> a language model that decodes: tokens per second, gain, parts, sizes
<!-- rows FILE COLUMN ... --> these columns of every row
<!-- results FILE ... of METHOD ... --> what quality/results/FILE.jsonl hold, a row for each method
<!-- machine FILE --> machine, versions, commit and command of a results file
<!-- end -->
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import harness

HERE = Path(__file__).parent
OURS = "prunus"
MIB = 1 << 20
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5% for 1, 2, ... degrees of freedom (Student 1908); beyond: the last."""
BLOCK = re.compile(
    r"(<!-- (ratios|times|accuracy|steps|structures|forms|difference|rows|results|machine)"
    r" ([^>]*?) -->\n)"
    r".*?(<!-- end -->)",
    re.S,
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
    return [name for name in names if name != OURS and not name.startswith("read ")]  # rooflines


def kind(case: dict[str, Any]) -> str:
    """What a layer is: "conv 3x3 64->64 at 56x56" is a "conv 3x3", "linear 768x768" a "linear"."""
    words = case["layer"].split()
    return " ".join(words[:2]) if words[0] == "conv" else words[0]


def gains(case: dict[str, Any]) -> dict[str, float]:
    """{peer: its best form's time over prunus'}, as "torch dense" and "torch dense, channels last".

    The median of the turns' ratios where a case has them, else the ratio of medians.
    """
    best: dict[str, float] = {}
    for name, time in case["seconds"].items():
        ratio = time["median"] / case["seconds"][OURS]["median"]
        if name != OURS:
            ratio = case.get("speedup", {}).get(name, {}).get("median", ratio)
            peer = name.partition(",")[0]
            best[peer] = min(ratio, best.get(peer, ratio))
    return best


def ratios(file: str, *words: str) -> str:
    """How many times longer each peer's best form takes; above 1 prunus is faster."""
    keys, found = words[1:], cases(file)
    groups: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    for case in found:
        group = tuple(kind(case) if key == "kind" else case[key] for key in keys)
        groups.setdefault(group, []).append(gains(case))
    names, lines = list(dict.fromkeys(n.partition(",")[0] for n in peers(found))), []
    for group in sorted(groups):
        cells = []
        for name in names:
            both = [case[name] for case in groups[group] if name in case]
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
    first = list(dict.fromkeys(case[keys[0]] for case in found))
    for case in sorted(found, key=lambda c: (first.index(c[keys[0]]), *(c[k] for k in keys[1:]))):
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
            cells.append(cell(points))
        means[name], order[name] = cells, fmean(last)
    names = sorted(means, key=lambda name: -order[name])
    header = ["method", *(f"{100 * sparsity:g}%" for sparsity in sparsities)]
    return markdown(header, [[f"`{name}`", *means[name]] for name in names])


def steps(file: str) -> str:
    """Milliseconds of a step, seconds of an epoch, MiB held and at the peak, a row per way."""
    header = (
        "model",
        "sparsity",
        "way",
        "step ms",
        "times faster",
        "epoch s",
        "held MiB",
        "peak MiB",
    )
    lines = []
    for case in cases(file):
        dense = case["ways"]["dense"]
        for way, found in case["ways"].items():
            times = (f"{1000 * found['step']:.1f}", f"{dense['step'] / found['step']:.2f}")
            sizes = (f"{found['bytes'] / MIB:.1f}", f"{found['peak'] / MIB:.0f}")
            name = (case["model"], f"{case['sparsity']:g}", way)
            lines.append([*name, *times, f"{found['epoch']:.2f}", *sizes])
    return markdown(header, lines)


def structures(file: str, *wanted: str) -> str:
    """Geometric means over the shapes; gains are over the same shapes' dense layers. No CSR."""
    found = cases(file)
    place = ("n", "sparsity", "rows", "columns")
    dense = {
        (*(case[key] for key in place), case["way"]): case["seconds"]["median"]
        for case in found
        if case["structure"] == "dense"
    }
    peers = list(dict.fromkeys(key[-1] for key in dense))
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for case in found:
        if case["structure"].replace(" ", "") in wanted and case["way"] != "CSR":
            name = (case["n"], case["sparsity"], case["structure"], case["way"])
            groups.setdefault(name, []).append(case)
    lines = []
    for name, same in sorted(groups.items()):
        shares = [case["share_of_peak"] for case in same if case["share_of_peak"]]
        cells = [f"{100 * harness.geometric_mean(shares):.0f}%" if shares else "–"]
        for peer in peers:
            gains = [
                dense[(*(case[key] for key in place), peer)] / case["seconds"]["median"]
                for case in same
            ]
            cells.append(f"{harness.geometric_mean(gains):.2f}")
        lines.append([*map(str, name), *cells])
    return markdown(["n", "sparsity", "structure", "way", "of the peak", *peers], lines)


def forms(file: str) -> str:
    """Tokens per second, gain over the dense form, milliseconds of its parts, MiB."""
    header = ["sparsity", "form", "tokens/s", "gain", "layers ms", "output ms", "rest ms"]
    lines = []
    for case in cases(file):
        parts = [f"{1000 * case[f'{part}_seconds']:.1f}" for part in ("layers", "output", "rest")]
        gain = f"{case['token_speedup']:.2f}" if "token_speedup" in case else "–"
        sizes = [f"{case[size] / MIB:.0f}" for size in ("file", "weights")]
        name = [f"{case['sparsity']:g}", case["form"], f"{case['tokens_per_second']:.1f}"]
        lines.append([*name, gain, *parts, *sizes])
    return markdown([*header, "file MiB", "resident MiB"], lines)


def difference(file: str, model: str, epochs: str) -> str:
    """Accuracy in percent, mean ± deviation (seeds); packed minus masked with its interval."""
    runs: dict[tuple[str, float], dict[str, dict[int, float]]] = {}
    for row in read(file):
        if row["model"] == model and row["epochs"] == int(epochs):
            ways = runs.setdefault((row["method"], row["sparsity"]), {"packed": {}, "masked": {}})
            ways[row["way"]][row["seed"]] = 100 * row["accuracy"]
    lines = []
    for (name, sparsity), ways in sorted(runs.items(), key=lambda item: (item[0][1], item[0][0])):
        packed, masked = ways["packed"], ways["masked"]
        both = [packed[seed] - masked[seed] for seed in sorted(packed.keys() & masked.keys())]
        cells = [cell(list(way.values())) for way in (packed, masked)]
        lines.append([f"`{name}`", f"{100 * sparsity:g}%", *cells, interval(both)])
    return markdown(("method", "sparsity", "packed", "masked", "packed − masked, 95%"), lines)


def cell(points: list[float]) -> str:
    return f"{fmean(points):.2f} ± {pstdev(points):.2f} ({len(points)})" if points else "–"


def interval(points: list[float]) -> str:
    """The mean and its confidence interval at 95%, by Student's t."""
    if len(points) < 2:
        return f"{points[0]:+.2f}" if points else "–"
    half = T[min(len(points), 1 + len(T)) - 2] * stdev(points) / len(points) ** 0.5
    return f"{fmean(points):+.2f} ({fmean(points) - half:+.2f} to {fmean(points) + half:+.2f})"


def rows(file: str, *columns: str) -> str:
    return markdown(columns, [[str(row.get(c, "–")) for c in columns] for row in read(file)])


def share(value: float | str) -> str:
    """50% of 0.5 or "0.5"; 2:4 stays."""
    return str(value) if ":" in str(value) else f"{100 * float(value):g}%"


Row = dict[str, Any]
RESULTS: dict[str, tuple[Callable[[Row], str | None], str, Callable[[Row], float], str]] = {
    "fashion_mnist": (
        lambda row: "LeNet" if row["network"] == "lenet_300_100" else "CNN",
        "sparsity",
        lambda row: 100 * row["accuracy"],
        ".2f",
    ),
    "sparse_training": (
        lambda row: (
            None
            if row["way"] == "masked" and row["method"] != "dense"
            else f"packed {'LeNet' if row['model'] == 'lenet' else 'CNN'}"
        ),
        "sparsity",
        lambda row: 100 * row["accuracy"],
        ".2f",
    ),
    "language_model": (
        lambda row: f"SmolLM2 ({row['calibration']})",
        "target",
        lambda row: row["perplexity"],
        ".4g",
    ),
    "encoder": (lambda row: "MiniLM", "sparsity", lambda row: row["mean_cosine"], ".3f"),
    "efficientnet": (lambda row: "EfficientNet", "sparsity", lambda row: row["kl"], ".3g"),
    "one_shot": (
        lambda row: f"once, {row['part']}",
        "sparsity",
        lambda row: 100 * row["accuracy"],
        ".2f",
    ),
}
"""Results file -> what was measured (None: not shown), key of the target, figure and its form."""
OTHER_NAMES = {"random": "random_pruning", "magnitude": "one_shot_magnitude"}


def measured(file: str) -> dict[str, dict[str, str]]:
    """Column -> method -> figure; dense networks stand in every column of their kind."""
    kind, target, figure, form = RESULTS[file]
    points: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in read(f"quality/results/{file}.jsonl"):
        shown = kind(row)
        if shown is not None:
            column = points.setdefault((shown, share(row[target])), {})
            name = OTHER_NAMES.get(str(row["method"]), str(row["method"]))
            column.setdefault(name, []).append(figure(row))
    for shown, amount in points:
        points[shown, amount].update(points.get((shown, "0%"), {}))
    return {
        f"{shown} {amount}": {name: spread(values, form) for name, values in column.items()}
        for (shown, amount), column in sorted(points.items())
        if amount != "0%"
    }


def spread(values: Sequence[float], form: str) -> str:
    deviation = f" ± {pstdev(values):{form}} ({len(values)})" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{deviation}"


def results(*words: str) -> str:
    """Only the columns in which one of the methods was measured; FILE:WORD,... with these words."""
    files, names = words[: words.index("of")], words[words.index("of") + 1 :]
    columns = {
        title: column
        for file, _, chosen in (word.partition(":") for word in files)
        if (HERE / f"quality/results/{file}.jsonl").exists()
        for title, column in measured(file).items()
        if set(names) & set(column) and any(word in title for word in chosen.split(","))
    }
    lines = []
    for name in ["dense", *names] if columns else names:
        cells = [column.get(name, "–") for column in columns.values()]
        if not set(cells) - {"–"}:
            lines.append([f"`{name}`: not measured", *cells])
        else:
            lines.append([f"`{name}`", *cells])
    return markdown(["method", *columns], lines)


def machine(file: str) -> str:
    content = json.loads((HERE / file).read_text())
    host, versions = content["machine"], content["versions"]
    named = ", ".join(f"{k} {v}" for k, v in versions.items() if v != "not installed")
    cases = content.get("cases", [])
    commits = dict.fromkeys(case["commit"] for case in cases if "commit" in case)
    names = list(commits) or [content["commit"]]
    commit = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return (
        f"`{content['command']}`, {content['date']}, commit {commit}, "
        f"{host['processor']}, {host['cores']} cores ({host['kernels']}), "
        f"{content['threads']} thread(s); {named}.\n"
    )


TABLES: dict[str, Callable[..., str]] = {
    "ratios": ratios,
    "times": times,
    "accuracy": accuracy,
    "steps": steps,
    "structures": structures,
    "forms": forms,
    "difference": difference,
    "rows": rows,
    "results": results,
    "machine": machine,
}


def refreshed(text: str) -> str:
    """The text with every table built anew from its results."""

    def build(match: re.Match[str]) -> str:
        start, kind, words, end = match.groups()
        file = words.split()[0]
        if "/" in file and not (HERE / file).exists():  # not measured yet
            return match.group()
        return f"{start}\n{TABLES[kind](*words.split())}\n{end}"

    return BLOCK.sub(build, text)


def main() -> None:
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(refreshed(page.read_text()))


if __name__ == "__main__":
    main()
