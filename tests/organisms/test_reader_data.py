"""The reader's data: determinism, disjointness of the held-out text, the needle grammar."""

from __future__ import annotations

import re

import numpy as np
import pytest

from foveate.organisms.reader import data

LINE = re.compile(rb"# key ([a-z]{4})=([0-9]{5})")


def text_of(ids: np.ndarray) -> bytes:
    return bytes(ids.astype(np.uint8))


def test_files_are_disjoint_and_stable():
    held, train = data.held_out_files(), data.train_files()
    assert len(held) >= 20
    assert len(train) >= 300
    assert not set(held) & set(train)
    assert held == tuple(sorted(held))
    names = {p.stem for p in held}
    assert {"tarfile", "heapq", "difflib"} <= names
    assert not {"tarfile", "heapq", "difflib"} & {p.stem for p in train}
    assert not any({"test", "tests", "site-packages"} & set(p.parts) for p in held + train)


def test_text_is_the_files_and_not_shared():
    held = data.stdlib_text(held_out=True)
    assert data.stdlib_text(held_out=True) == held
    assert 400_000 < len(held) < len(data.stdlib_text(held_out=False)) / 4
    for probe in (b"class TarFile(object):", b"def heappushpop(heap, item):"):
        assert probe in held
        assert probe not in data.stdlib_text(held_out=False)


def test_submodules_of_a_held_out_name_are_held_out():
    assert data._is_held_out("pathlib")
    assert data._is_held_out("pathlib._local")
    assert not data._is_held_out("pathlibx")
    assert not data._is_held_out("asyncio.base_events")


def test_tokenizer_round_trip():
    tok = data.ByteTokenizer()
    assert tok.decode(tok.encode("déjà\n")) == "déjà\n"
    assert tok.encode(b"\x00\xff") == [0, 255]
    assert tok.vocab_size == 256


@pytest.mark.parametrize("length", [99, 128, 401, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_needle_grammar(length: int, depth: float):
    text = data.stdlib_text(held_out=True)
    ids, answer = data.needle(length, depth, np.random.default_rng(3), text)
    assert ids.shape == (length,)
    assert ids.dtype == np.int64
    lines = LINE.findall(text_of(ids))
    assert len(lines) == 5  # needle, three distractors, query
    key, value = lines[-1]
    assert text_of(ids[answer]) == value
    assert answer.stop == length
    assert [v for k, v in lines[:-1] if k == key] == [value]
    assert len({k for k, _ in lines}) == 4


def test_needle_depth_moves_the_needle():
    text = data.stdlib_text(held_out=True)
    places = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        ids, answer = data.needle(2048, depth, np.random.default_rng(5), text)
        whole = text_of(ids)
        places.append(whole.find(whole[-data.LINE + 1 : answer.start]))
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] == 2048 - 2 * data.LINE + 1
    assert abs(places[2] - 1024) < 200


def test_needle_is_deterministic_and_checked():
    text = data.stdlib_text(held_out=True)
    one, _ = data.needle(300, 0.5, np.random.default_rng([0, 1]), text)
    two, _ = data.needle(300, 0.5, np.random.default_rng([0, 1]), text)
    other, _ = data.needle(300, 0.5, np.random.default_rng([0, 2]), text)
    assert (one == two).all()
    assert not (one == other).all()
    with pytest.raises(ValueError, match="length: 50"):
        data.needle(50, 0.5, np.random.default_rng(0), text)
    with pytest.raises(ValueError, match=r"depth: 1\.5"):
        data.needle(300, 1.5, np.random.default_rng(0), text)
    with pytest.raises(ValueError, match="text: 4 bytes"):
        data.needle(300, 0.5, np.random.default_rng(0), b"abc\n")


@pytest.mark.parametrize("length", [65, 129, 257, 1025, 4097])
def test_training_sequence_roles(length: int):
    text = data.stdlib_text()
    rng = np.random.default_rng(length)
    for _ in range(30):
        ids, roles = data.retrieval_sequence(length, rng, text)
        assert ids.shape == roles.shape == (length,)
        whole, seen, answers = text_of(ids), {}, 0
        for m in LINE.finditer(whole):
            key, value = m.groups()
            expected = data.ANSWER if key in seen else data.IGNORE
            assert (roles[m.start(2) : m.end(2)] == expected).all()
            assert (roles[m.start() : m.start(2)] == data.IGNORE).all()
            assert seen.setdefault(key, value) == value
            answers += expected == data.ANSWER
        assert (roles == data.ANSWER).sum() == 5 * answers > 0


def test_batch_and_positions_are_deterministic():
    text = data.stdlib_text()
    a = data.batch(4, 128, 0.5, np.random.default_rng([7, 1]), text)
    b = data.batch(4, 128, 0.5, np.random.default_rng([7, 1]), text)
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    p = data.stretched_positions(200, 64, 512, 0.5, np.random.default_rng(0))
    assert (np.diff(p, axis=1) >= 1).all()
    assert p.max() < 512
    moved = (p[:, -1] > 63).mean()
    assert 0.3 < moved < 0.7
    assert (data.stretched_positions(3, 64, 64, 1.0, np.random.default_rng(0)) == np.arange(64)).all()
