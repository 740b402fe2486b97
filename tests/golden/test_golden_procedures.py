"""Procedures: three ways to retrain, fine-tuning; killed and resumed between rounds."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prunus import methods, scores, solvers
from prunus.errors import ValueRangeError

STEPS, SPARSITY = 14, 0.75


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Dropout(0.2), nn.Tanh(), nn.Linear(10, 2)
    return nn.Sequential(*layers)


def data(shuffle=False):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(40, 6, generator=generator)
    y = torch.stack([x[:, 0] * x[:, 1], x.sum(1)], 1)
    source = torch.Generator().manual_seed(4) if shuffle else None
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle, generator=source)


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def rate(step):
    return 1.0 if step < 9 else 0.1


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2))


NAMES = ("0.weight", "2.weight")


def by_hand(way, rewind_step, rounds):
    """Every way written out, over batches 0, 1, ... of a list; weights are multiplied by masks."""
    batches, model = list(data()), plain()
    weights = dict(model.named_parameters())
    masks = {n: torch.ones_like(weights[n]) for n in NAMES}
    start, history = None, []
    for done in range(rounds + 1):
        if done:
            pool = torch.cat([weights[n].detach().abs().reshape(-1) for n in NAMES])
            off = torch.cat([masks[n].reshape(-1) == 0 for n in NAMES])
            pool[off] = -1.0
            keep = round(len(pool) * (1 - SPARSITY) ** (done / rounds))
            flat = torch.zeros(len(pool))
            flat[pool.argsort(descending=True, stable=True)[:keep]] = 1.0
            first = weights[NAMES[0]].numel()
            masks = {NAMES[0]: flat[:first].reshape(10, 6), NAMES[1]: flat[first:].reshape(2, 10)}
            if way == "weights":
                model.load_state_dict(start)
            with torch.no_grad():
                for n in NAMES:
                    weights[n].mul_(masks[n])
        optimizer = optimizer_of(model)
        for step in range(rewind_step if done else 0, STEPS):
            if not done and step == rewind_step:
                start = {k: v.clone() for k, v in model.state_dict().items()}
            tuned = done and way == "fine_tune"
            optimizer.param_groups[0]["lr"] = 0.05 * (0.1 if tuned else rate(step))
            optimizer.zero_grad()
            loss(model, batches[step % 5]).backward()
            for n in NAMES:
                weights[n].grad.mul_(masks[n])
            optimizer.step()
            with torch.no_grad():
                for n in NAMES:
                    weights[n].mul_(masks[n])
        history.append({n: mask.bool() for n, mask in masks.items()})
    return model, history


@pytest.mark.parametrize("way", ["weights", "learning_rate", "fine_tune"])
@pytest.mark.parametrize("rewind_step", [0, 7])
def test_the_three_ways_equal_loops_by_hand(way, rewind_step):
    expected, history = by_hand(way, rewind_step, 3)
    model = plain()
    loop = methods.Loop(data(), loss, STEPS, rate)
    tickets = methods.lottery_ticket(
        model,
        optimizer_of,
        loop,
        sparsity=SPARSITY,
        rounds=3,
        way=way,
        rewind_step=rewind_step,
        progress=False,
    )
    for ticket, masks in zip(tickets, history, strict=True):
        for n, mask in masks.items():
            assert torch.equal(ticket.masks.get(n, torch.ones_like(mask)), mask), (ticket.round, n)
    for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_train_prune_finetune_is_fine_tuning_with_any_slots():
    runs = []
    for way in ("tickets", "fine"):
        model = plain()
        loop = methods.Loop(data(), loss, STEPS, rate)
        kwargs = {"sparsity": SPARSITY, "rounds": 2, "progress": False}
        if way == "tickets":
            methods.lottery_ticket(
                model, optimizer_of, loop, way="fine_tune", rewind_step=3, **kwargs
            )
        else:
            methods.train_prune_finetune(model, optimizer_of, loop, start=3, **kwargs)
        runs.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))

    model, seen = plain(), []
    batches = [batch[0] for batch in data()]
    tickets = methods.train_prune_finetune(
        model,
        optimizer_of,
        methods.Loop(data(), loss, STEPS, rate),
        sparsity=0.5,
        score=scores.wanda(),
        solve=solvers.sparsegpt(),
        batches=batches,
        on_round=seen.append,
        progress=False,
    )
    assert [t.round for t in tickets] == [0, 1]
    assert seen == tickets
    zeros = sum(int((model.get_parameter(n) == 0).sum()) for n in NAMES)
    assert zeros == round(0.5 * 80)


class Killed(BaseException):
    """What ends a run between two rounds."""


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("way", ["weights", "fine_tune"])
def test_a_run_that_was_killed_between_rounds_goes_on_bit_for_bit(way, stop, tmp_path):
    def run(folder, kill=None, seed=0):
        model = network(seed)
        loop = methods.Loop(data(shuffle=True), loss, STEPS, rate)
        torch.manual_seed(11 + seed)
        np.random.seed(seed)  # noqa: NPY002

        def on_round(ticket):
            if ticket.round == kill:
                raise Killed

        tickets = methods.lottery_ticket(
            model,
            optimizer_of,
            loop,
            sparsity=0.8,
            rounds=3,
            way=way,
            rewind_step=5,
            folder=folder,
            progress=False,
            on_round=on_round,
        )
        return model, tickets

    whole, expected = run(None)
    with pytest.raises(Killed):
        run(tmp_path / "run", kill=stop)
    resumed, tickets = run(tmp_path / "run", seed=3)  # another start: all comes from the files
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for ours, theirs in zip(tickets, expected, strict=True):
        assert (ours.round, ours.sparsity, ours.result) == (
            theirs.round,
            theirs.sparsity,
            theirs.result,
        )
        assert all(torch.equal(ours.masks[n], theirs.masks[n]) for n in theirs.masks)
    again, tickets = run(tmp_path / "run", seed=5)  # nothing is left to do
    assert torch.equal(again[0].weight, whole[0].weight)
    with pytest.raises(ValueRangeError, match=r"rounds=3, now it is 2: name another folder"):
        methods.lottery_ticket(
            network(),
            optimizer_of,
            methods.Loop(data(), loss, STEPS),
            sparsity=0.8,
            rounds=2,
            way=way,
            rewind_step=5,
            folder=tmp_path / "run",
        )


def test_a_process_that_dies_at_once_leaves_whole_files(tmp_path):
    program = textwrap.dedent("""
        import os, sys, torch
        from torch import nn
        from prunus import methods
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        batches = [torch.randn(5, 6) for _ in range(4)]
        loop = methods.Loop(batches, lambda m, x: m(x).square().mean(), 6)
        def on_round(ticket):
            if sys.argv[2] == str(ticket.round):
                os._exit(9)
        methods.lottery_ticket(
            model, lambda m: torch.optim.Adam(m.parameters()), loop, sparsity=0.5, rounds=2,
            folder=sys.argv[1] or None, on_round=on_round, progress=False,
        )
        print([p.sum().item() for p in model.parameters()])
    """)

    def run(folder, kill):
        return subprocess.run(
            [sys.executable, "-c", program, folder, kill],
            capture_output=True,
            text=True,
            check=False,
        )

    whole = run("", "-")
    assert whole.returncode == 0, whole.stderr
    assert run(str(tmp_path), "1").returncode == 9
    resumed = run(str(tmp_path), "-")
    assert json.loads(resumed.stdout) == json.loads(whole.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round-000.safetensors",
        "round-001.safetensors",
        "round-002.safetensors",
        "start.safetensors",
    ]


# --- loops, progress -----------------------------------------------------------------


def test_a_loop_starts_in_the_middle_with_its_rates_and_gives_them_back():
    seen = []
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def note(model, batch):
        seen.append((batch, optimizer.param_groups[0]["lr"]))
        return model.weight.sum() * 0

    loop = methods.Loop([10, 11, 12], note, 8, lambda step: 1 / (1 + step))
    loop(model, optimizer, 5)
    assert seen == [(12, 0.5 / 6), (10, 0.5 / 7), (11, 0.5 / 8)]
    assert optimizer.param_groups[0]["lr"] == 0.5
    seen.clear()
    loop.fine_tune(model, optimizer, 6)
    assert seen == [(10, 0.5 / 8), (11, 0.5 / 8)]
    seen.clear()
    loop.epoch(model, optimizer, 1)
    assert seen == [(10, 0.5 / 4), (11, 0.5 / 5), (12, 0.5 / 6)]
    with pytest.raises(ValueRangeError, match="no batch"):
        methods.Loop([], note, 3)(model, optimizer, 0)


def test_progress_and_refusals(capsys):
    loop, seen = methods.Loop(data(), loss, 3), []

    def run(**more):
        methods.lottery_ticket(plain(), optimizer_of, loop, sparsity=0.5, rounds=2, **more)

    run(progress=lambda *what: seen.append(what))
    assert [(done, total) for done, total, _ in seen] == [(0, 2), (1, 2), (2, 2)]
    assert "sparsity 0.5000" in seen[-1][2]
    run(progress=True)
    assert capsys.readouterr().err.count("lottery_ticket") == 3
    run()
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueRangeError, match="fine_tune="):
        methods.lottery_ticket(
            plain(), optimizer_of, lambda *a: None, sparsity=0.5, way="fine_tune"
        )
    with pytest.raises(ValueRangeError, match="allowed: weights, learning_rate, fine_tune"):
        methods.lottery_ticket(plain(), optimizer_of, loop, sparsity=0.5, way="other")  # type: ignore
