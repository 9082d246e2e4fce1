"""MQAR and ListOps: the data against its definition, training that goes on after an interruption."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch

from foveate.bench.listops import TOKENS, ListOps, size, value, written
from foveate.bench.mqar import FIGURE_TESTS, IGNORE, MQAR, learn, published_model
from foveate.layers import BaseConv, GatedLinearAttention


@pytest.mark.parametrize(
    ("length", "pairs", "vocab"), [(64, 4, 8192), (128, 8, 8192), (32, 8, 40), (16, 4, 10)]
)
@pytest.mark.parametrize("fill", ["zero", "random"])
def test_rows_follow_the_definition(length, pairs, vocab, fill):
    ids, targets = MQAR(length, pairs, vocab, fill=fill).rows(200, torch.Generator().manual_seed(1))
    half = vocab // 2
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < half for key in keys)
        assert all(half <= v < vocab for v in values)
        asked = [at for at, target in enumerate(wanted) if target != IGNORE]
        assert all(at >= 2 * pairs and at % 2 == 0 for at in asked)
        assert sorted(row[at] for at in asked) == sorted(keys)
        assert all(wanted[at] == values[keys.index(row[at])] for at in asked)
        rest = [token for at, token in enumerate(row[2 * pairs :], 2 * pairs) if at not in asked]
        if fill == "zero":
            assert not any(rest)


def test_gaps_follow_the_power_law():
    task = MQAR(32, 2, 64)
    gaps = task.gaps(20_000, torch.Generator().manual_seed(2))
    space = (32 - 4) // 2
    p = torch.arange(1, space + 1).double() ** (0.01 - 1)
    p /= p.sum()
    first = torch.bincount(gaps[:, 0], minlength=space) / 20_000
    torch.testing.assert_close(first.double(), p, atol=0.01, rtol=0)
    second = sum(p[i] * torch.where(torch.arange(space) == i, 0.0, p / (1 - p[i])) for i in range(space))
    torch.testing.assert_close(
        torch.bincount(gaps[:, 1], minlength=space) / 20_000, second.float(), atol=0.01, rtol=0
    )
    assert bool((gaps[:, 0] != gaps[:, 1]).all())


def test_what_a_window_can_know():
    task, g = MQAR(), torch.Generator()
    ids, targets = task.rows(2000, g.manual_seed(3))
    for reach in (7, 15, 31):
        known = []
        for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
            asked = [at for at, target in enumerate(wanted) if target != IGNORE]
            known += [at - row.index(wanted[at]) <= reach for at in asked]
        assert abs(task.within(reach, g.manual_seed(4)) - statistics.mean(known)) < 0.02


def test_an_interrupted_run_goes_on(tmp_path):
    task = MQAR(16, 2, 32)

    def run(epochs_seen, keep, fail_at=None):
        torch.manual_seed(0)
        model = published_model(32, 16, lambda i: GatedLinearAttention(16, 2) if i else BaseConv(16))

        def told(epoch, loss, accuracy):
            epochs_seen.append(epoch)
            if epoch == fail_at:
                raise KeyboardInterrupt

        train = [(task, 32), (MQAR(12, 1, 32), 16)]
        curve = learn(model, train, [(task, 16)], lr=1e-2, batch=16, epochs=4, keep=keep, told=told)
        return curve, model.embed.weight.detach()

    whole, weights = run([], None)
    with pytest.raises(KeyboardInterrupt):
        run([], tmp_path, fail_at=1)
    seen: list[int] = []
    again, resumed = run(seen, tmp_path)
    assert seen == [2, 3]
    assert again == whole
    torch.testing.assert_close(resumed, weights)


PUBLISHED_WINDOWS = {8: 0.09, 16: 0.15, 32: 0.32, 64: 0.52, 128: 0.66, 256: 0.80, 512: 0.94, 1024: 1.0}


def test_what_windows_can_know_is_what_was_published():
    """The curve of sliding windows in the recall-memory figure (digitised, +-0.02) follows from the data alone."""
    for window, published in PUBLISHED_WINDOWS.items():
        known = [task.within(window, torch.Generator().manual_seed(0), 1000) for task, _ in FIGURE_TESTS]
        assert abs(statistics.mean(known) - published) < 0.05, window


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"length": 63}, "even"),
        ({"pairs": 17}, "4 \\* pairs"),
        ({"vocab": 8}, "hold 4 keys"),
        ({"fill": "noise"}, "fill"),
    ],
)
def test_mqar_errors(arguments, says):
    with pytest.raises(ValueError, match=says):
        MQAR(**arguments)


def evaluated(tokens):
    """The answer from the written form, by a stack."""
    stack = []
    for token in tokens:
        if token == "]":
            arguments = list(itertools.takewhile(lambda t: not isinstance(t, str), reversed(stack)))
            del stack[len(stack) - len(arguments) :]
            name = stack.pop()
            what = {"[MIN": min, "[MAX": max, "[MED": statistics.median, "[SM": lambda a: sum(a) % 10}
            stack.append(int(what[name](arguments)))
        else:
            stack.append(token if token.startswith("[") else int(token))
    (answer,) = stack
    return answer


def test_listops():
    task = ListOps(depth=5, shortest=20, longest=60)
    trees = list(itertools.islice(task.trees(7), 200))
    assert trees == list(itertools.islice(task.trees(7), 200))
    assert all(20 < size(tree) < 60 for tree in trees)
    assert all(evaluated(written(tree).split()) == value(tree) for tree in trees)
    assert all(len(written(tree).split()) == size(tree) for tree in trees)
    rows, answers = task.rows(5, 7)
    assert [" ".join(TOKENS[t] for t in row) for row in rows] == [written(tree) for tree in trees[:5]]
    assert answers == [value(tree) for tree in trees[:5]]
    with pytest.raises(ValueError, match="no tree"):
        next(ListOps(depth=2, args=(2, 2), shortest=100, longest=200).trees(0))
    with pytest.raises(ValueError, match="depth"):
        ListOps(depth=1)
    with pytest.raises(ValueError, match="shortest"):
        ListOps(shortest=10, longest=11)
