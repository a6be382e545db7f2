"""The demo: whose turn it is, when a difference counts as one, what memory means, and that all of it runs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import slime_fused
from tests.tiny_models import make_pairs, make_tokenizer, tiny_llama

sys.path += [str(Path(__file__).parents[2] / "examples"), str(Path(__file__).parent)]

import demo
import demo_data
from demo_memory import TensorMemory
from demo_stats import MIN_ROUNDS, Comparison, Spread
from demo_turns import Contestant, ContestantError, take_turns
from demo_worker import Head, Training


def contestant(name: str, folder: Path, serve: str = "steps", **options: object) -> Contestant:
    if serve == "steps":
        options = {"diary": folder / "diary", "seconds": 0.02} | options
    return Contestant(name, f"demo_contestants:{serve}", folder / f"{name}.log", **options)


def test_contestants_take_turns_and_never_work_at_the_same_time(tmp_path):
    with contestant("naive", tmp_path) as naive, contestant("fused", tmp_path) as fused:
        for turn in range(5):
            requests = {"naive": f"naive{turn}", "fused": f"fused{turn}"}
            assert take_turns([naive, fused], turn, requests, 60) == requests
    rows = [line.split() for line in (tmp_path / "diary").read_text().splitlines()]
    order = [name for turn in range(5) for name in ((f"naive{turn}", f"fused{turn}")[:: -1 if turn % 2 else 1])]
    assert [name for name, *_ in rows] == order
    times = [float(moment) for _, *moments in rows for moment in moments]
    assert times == sorted(times), "two steps overlapped"  # one machine-wide clock (Linux, macOS)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("exit", "died (exit status 3)"),
        ("raise", "died (exit status 1)"),
        ("kill", "died (killed by SIGKILL, perhaps for want of memory)"),
        ("hang", "gave no answer to 'second' within 1 s and was ended"),
        ("stop", "gave no answer to 'second' within 1 s and was ended"),
    ],
)
def test_a_contestant_that_dies_or_hangs_is_named_and_holds_up_nobody(tmp_path, how, says):
    with contestant("good", tmp_path) as good, contestant("bad", tmp_path, "fails", how=how, answers=1) as bad:
        requests = {"good": "first", "bad": "first"}
        assert take_turns([bad, good], 0, requests, 60) == requests
        began = time.monotonic()
        with pytest.raises(ContestantError) as caught:
            bad.ask("second", 1 if how in ("hang", "stop") else 60)
        message = str(caught.value)
        assert "the bad contestant" in message
        assert says in message
        assert f"about to {how}" in message  # the last lines that it printed
        assert ("ZeroDivisionError" in message) == (how == "raise")
        assert good.ask("second", 60) == "second"
    assert time.monotonic() - began < 30, "the hanging contestant was waited for"


def test_an_error_between_turns_ends_every_contestant_at_once(tmp_path):
    busy = contestant("busy", tmp_path, seconds=300)

    def interrupted() -> None:
        with busy:
            busy._connection.send("a long step")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert busy._process.exitcode is not None


def test_no_verdict_where_spreads_overlap_or_rounds_are_few():
    fast = [1.0, 1.01, 1.02, 1.03, 1.04, 1.05]
    slow = [2 * seconds for seconds in fast]
    assert Comparison.of(slow, fast).verdict == "fused 2.00x faster"
    assert Comparison.of(fast, slow).verdict == "naive 2.00x faster"
    assert Comparison.of(fast, fast).verdict == "none (overlap)"
    assert Comparison.of(slow, [1.0, 1.01, 1.02, 1.03, 1.04, 4.0]).verdict == "none (overlap)"
    assert Comparison.of(slow[:5], fast[:5]).verdict == "none (5 rounds)"
    with pytest.raises(ValueError, match="zip"):
        Comparison.of(slow, fast[:5])


def test_spread_leaves_out_the_outer_tenths():
    assert Spread.of([float(n) for n in range(11)]) == Spread(1.0, 5.0, 9.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


@pytest.mark.parametrize("stalls", [False, True], ids=["even", "stalling"])
@pytest.mark.parametrize("rounds", [MIN_ROUNDS, 10])
def test_equal_contestants_are_rarely_told_apart(rounds, stalls):
    """The claim of MIN_ROUNDS; and an honest factor of 1.5 is still seen nearly always where nothing stalls."""
    random = np.random.default_rng(0)

    def seconds() -> np.ndarray:
        noise = np.exp(random.normal(0, 0.1, (2000, rounds)))
        return noise * np.where(
            random.random(noise.shape) < 0.3 * stalls, 1 + random.exponential(1.5, noise.shape), 1
        )

    def share_of_verdicts(factor: float) -> float:
        naive, fused = seconds() * factor, seconds()
        return float(
            np.mean(["x faster" in Comparison.of(*pair).verdict for pair in zip(naive, fused, strict=True)])
        )

    assert share_of_verdicts(1.0) < 1 / 50
    assert stalls or share_of_verdicts(1.5) > 0.9


def test_a_slow_spell_changes_no_verdict():
    """Half the rounds on a machine three times slower: both pay, so the ratio stays; no difference is made up."""
    spell = [1.0] * 5 + [3.0] * 5
    naive, fused = ([factor * s for s in spell] for factor in (1.2, 1.0))
    comparison = Comparison.of(naive, fused)
    assert comparison.ratio == pytest.approx(1.2)
    assert comparison.verdict == "none (overlap)"


@pytest.mark.parametrize(
    ("count", "seconds", "at_least", "expected"),
    [
        (4, 1000, 2, 4),  # time enough
        (9, 45, 2, 4),  # ten seconds each: the fifth would end too late
        (9, 5, 3, 3),  # too little for anything: the least
        (2, 5, 3, 2),
    ],
)
def test_turns_end_in_time(monkeypatch, count, seconds, at_least, expected):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    taken = []
    for turn, is_last in demo.turns(count, seconds, at_least):
        taken.append((turn, is_last))
        now[0] += 10.0
    assert taken == [(n, n == expected - 1) for n in range(expected)]


def test_memory_is_the_most_that_tensors_hold_at_once():
    kept = torch.zeros(1000)
    with TensorMemory() as memory:
        for _ in range(3):
            block = torch.empty(1 << 20)
            half = block[: 1 << 19] + 1.0
            del block, half
        kept = kept + 1.0
    assert memory.peak == pytest.approx((4 + 2) << 20, abs=10_000)


class Requests:
    """The connection of a contestant, with the requests in a list."""

    def __init__(self, requests: list[dict]) -> None:
        self.requests, self.answers = requests, []

    def recv(self) -> dict:
        return self.requests.pop(0)

    def send(self, answer: dict) -> None:
        self.answers.append(answer)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model folder and pairs.jsonl, as `--model` and `--data` take them."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = make_tokenizer()
    tiny_llama(len(tokenizer), tie_word_embeddings=True).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(40)))
    return folder


def train(start: Path, impl: str, evaluate: bool, steps: int = 4) -> list[dict]:
    tokenizer = make_tokenizer()
    shape = {"num_pairs": 2, "max_length": 64, "steps": steps, "held_out": 3}
    run = Training(tiny_llama(8000), tokenizer, start / "pairs.jsonl", start / impl, impl, **shape)
    if evaluate:
        run.evaluate()
    requests = [
        {"do": "step", "memory": n == 1, "evaluate": evaluate and n in (0, steps - 1), "last": n == steps - 1}
        for n in range(steps)
    ]
    connection = Requests(requests[1:])
    run.run(connection, requests[0])
    assert not connection.requests
    return connection.answers


def test_memory_does_not_depend_on_an_evaluation_before(start):
    memory = {
        (impl, evaluate): train(start, impl, evaluate)[1]["memory"]
        for impl in ("naive", "fused")
        for evaluate in (False, True)
    }
    for impl in ("naive", "fused"):
        # A few small tensors, such as those of the last batch, live a little longer after an evaluation.
        assert memory[impl, True] == pytest.approx(memory[impl, False], rel=0.01)
    assert memory["naive", True] > 2 * memory["fused", True]  # 8000 words: the logits are most of it


def test_steps_report_losses_times_and_the_same_held_out_pairs(start):
    naive, fused = train(start, "naive", False), train(start, "fused", True)
    assert [answer["step"] for answer in fused] == [1, 2, 3, 4]
    for a, b in zip(naive, fused, strict=True):
        torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-5, atol=1e-5)
        assert a["tokens"] == b["tokens"]
    for answer in naive:
        assert ("memory" in answer) != ("seconds" in answer), "a step measured for memory is not timed"
    assert [n for n, answer in enumerate(fused) if "evaluation" in answer] == [0, 3]
    # Evaluated apart, before anything was trained: the same numbers as from the pairs themselves.
    first, last = fused[0]["evaluation"], fused[3]["evaluation"]
    assert first["logps/chosen"] - first["logps/rejected"] == pytest.approx(first["rewards/margins"])
    assert last["loss"] != first["loss"]


def test_head_alone_agrees_between_impls(start):
    tokenizer = make_tokenizer()
    model = tiny_llama(8000)
    naive, fused = (Head(model, tokenizer, start / "pairs.jsonl", impl, 3, 64) for impl in ("naive", "fused"))
    torch.testing.assert_close(naive.measure(False)["loss"], fused.measure(False)["loss"], rtol=1e-5, atol=0)
    assert fused.measure(True)["memory"] < naive.measure(True)["memory"]
    assert fused.measure(True)["memory"] == fused.measure(True)["memory"]


@pytest.mark.slow
def test_the_whole_demo_on_a_tiny_model(start, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--model", str(start / "model"), "--data", str(start / "pairs.jsonl"), "--folder", str(tmp_path)]
    assert demo.main([*options, "--rounds", "6", "--steps", "9"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["train"]["naive"]) == len(results["head"]["fused"]) == 8
    assert len(results["train"]["fused"]) == 9
    assert [row["step"] for row in results["train"]["evaluations"]] == [0, 5, 9]
    assert results["train"]["held_out"] == demo.HELD_OUT
    assert (tmp_path / "demo.png").stat().st_size > 50_000
    assert (tmp_path / "trained" / "adapter_model.safetensors").exists()
    printed = capfd.readouterr().out
    for part in ("Whole step", "memory it adds", "held-out pairs", "Prompt:", "After:"):
        assert part in printed


def test_a_dead_contestant_fails_the_demo(start, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(demo, "WORKER", "demo_contestants:fails")
    options = ["--model", str(start / "model"), "--data", str(start / "pairs.jsonl")]
    assert demo.main([*options, "--folder", str(tmp_path / "dead")]) == 1
    printed = " ".join(capfd.readouterr().out.split())
    assert "demo: error: the naive contestant died (exit status 3)" in printed
    assert "about to exit" in printed
    assert not (tmp_path / "dead" / "results.json").exists()


def test_a_missing_model_is_named_before_anything_starts(start, tmp_path, capfd):
    options = ["--model", str(tmp_path / "nowhere"), "--data", str(start / "pairs.jsonl")]
    assert demo.main([*options, "--folder", str(tmp_path / "out")]) == 1
    assert f"--model: no such file or folder: {tmp_path / 'nowhere'}" in capfd.readouterr().out.replace("\n", "")
    assert not list((tmp_path / "out").glob("*.log"))


def test_rows_of_the_fetched_pairs_become_messages():
    row = {
        "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    assert demo_data.to_pair(row) == {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "h"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }


def test_memory_counts_the_scratch_that_is_kept_between_calls():
    """Otherwise the second call of a loss would seem to need none."""
    hidden, weight = torch.randn(2, 200, 8), torch.randn(32000, 8)
    labels = torch.zeros(2, 200, dtype=torch.int64)
    slime_fused.linear_logprobs(hidden, weight, labels)
    with TensorMemory() as memory:
        slime_fused.linear_logprobs(hidden, weight, labels)
    slime_fused.empty_cache()
    assert memory.peak >= 400 * 32000 * 4
