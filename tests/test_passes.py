"""support/passes.py: passes are bounded by tokens, hold each row once, and are equally many on all ranks."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TAIL, flags, read_log, rl_flags, run_here, run_processes, turn_pair

import eval as ev
import rl
import sft
from support.passes import PASS_COST, cut_into_passes, padded_length, padding_share, same_number_on_all_ranks
from support.settings import parse_args


def published_lengths(n, seed):
    """Return lengths like those of published rows: lognormal with median 400, and 5 % pages of 3,000 tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(400), 0.6, n).astype(int)
    return np.where(rng.random(n) < 0.05, 3000, lengths).tolist()


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # no GPU is used: it is only a name
@pytest.mark.parametrize("pass_tokens", [1, 2000, 16_384, 10**9])
def test_passes_are_bounded_and_complete(pass_tokens, device):
    """Each row is in one pass. Rows x longest row is at most --pass_tokens, or the pass is a single row."""
    lengths = published_lengths(256, seed=0) + [0, 0, 7]
    passes = cut_into_passes(lengths, pass_tokens, device)
    assert sorted(n for rows in passes for n in rows) == [*range(len(lengths))]
    for rows in passes:
        assert len(rows) == 1 or len(rows) * padded_length(max(lengths[n] for n in rows), device) <= pass_tokens
    tokens = [len(rows) * padded_length(lengths[rows[0]], device) for rows in passes]
    assert tokens == sorted(tokens, reverse=True), "an out-of-memory error would come late"
    assert cut_into_passes([], pass_tokens, device) == []


@pytest.mark.parametrize("pass_tokens", [16_384, 32_768])
def test_padding_of_published_lengths(pass_tokens):
    """At most 6 % pads in a step of 128 pairs with the lengths of published rows, on a GPU too. Bug story: passes that
    took as many rows as the bound allows had 12 % at 16,384 tokens and 20 % at 32,768."""
    for seed in range(20):
        lengths = published_lengths(2 * 128, seed)
        assert padding_share(lengths, cut_into_passes(lengths, pass_tokens, "cuda"), "cuda") < 0.06


def test_passes_cost_least():
    """No other way to cut the sorted rows has fewer tokens plus PASS_COST for each pass."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = sorted(rng.integers(1, 900, 8).tolist(), reverse=True)

        def cost(passes, lengths=lengths):
            if any(len(rows) > 1 and len(rows) * lengths[rows[0]] > 2000 for rows in passes):
                return float("inf")
            return sum(PASS_COST + len(rows) * lengths[rows[0]] for rows in passes)

        ways = []
        for cuts in itertools.product((False, True), repeat=7):
            at = [0, *(i + 1 for i in range(7) if cuts[i]), 8]
            ways.append([[*range(a, b)] for a, b in itertools.pairwise(at)])
        assert sum(lengths) < 0.75 * 8 * lengths[0] or 8 * lengths[0] > 2000  # otherwise one pass is preferred
        assert cost(cut_into_passes(lengths, 2000)) == min(map(cost, ways))
    assert cut_into_passes([900, 800, 400], 2700) == [[0, 1, 2]], "one pass: SFT needs no second forward pass"


def test_a_page_and_short_rows_are_not_one_pass():
    """Bug story: all rows fitted into one pass, so they were one, with 70 % pads and three times the time."""
    lengths = [3000] + [400] * 7
    assert cut_into_passes(lengths, 32_768) == [[0], [*range(1, 8)]]


@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_have_the_same_number_of_passes(processes, tmp_path):
    """The ranks' rows have very different lengths. Each rank keeps all rows, and its first pass is the largest."""

    def main():
        rank, _, _ = sft.start_processes()
        lengths = [10 * 9**rank] * 5 + [1] * 3
        passes = same_number_on_all_ranks(cut_into_passes(lengths, 100))
        (tmp_path / f"{rank}.json").write_text(json.dumps([lengths, passes]))

    run_processes(SimpleNamespace(__name__="passes", main=main), [], processes)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    alone = [len(cut_into_passes(lengths, 100)) for lengths, _ in found]
    assert len(set(alone)) > 1, "the ranks would have had the same number anyway"
    for lengths, passes in found:
        assert len(passes) == max(alone) and all(passes)
        assert sorted(n for rows in passes for n in rows) == [*range(8)]
        tokens = [len(rows) * lengths[rows[0]] for rows in passes]
        assert tokens[0] == max(tokens)


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("module, given", [(sft, flags), (rl, rl_flags)])
def test_ranks_with_long_and_short_rows(module, given, processes, fsdp, writer_dir, world, tmp_path, monkeypatch):
    """Texts of 1 to 128 words: some ranks need more passes than others. The first step is that of one rank."""
    rows = json.loads((world / f"{module.__name__}.json").read_text())[:8]
    for i, row in enumerate(rows):
        row["dataset_name"] = "one"
        if module is rl:
            row["qry_text"] = "what " * 2**i
        else:
            row["qry"] = {"conversations": turn_pair("what " * 2**i + TAIL, "<think>a</think><answer>b<gen_emb>")}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    more = dict(data=tmp_path / "rows.json", batch_size=8, steps=2, lr=1e-5, pass_tokens=160)
    run_here(module, given(writer_dir, world, tmp_path / "one", **more), monkeypatch)

    def count_passes(rank):
        def counted(passes):
            with open(tmp_path / f"{rank}.txt", "a") as file:
                file.write(f"{len(passes)} ")
            return same_number_on_all_ranks(passes)

        module.same_number_on_all_ranks = counted

    argv = given(writer_dir, world, tmp_path / "many", fsdp=fsdp, **more)
    run_processes(module, argv, processes, before=count_passes)
    numbers = [(tmp_path / f"{rank}.txt").read_text() for rank in range(processes)]
    assert len(set(numbers)) > 1, "all ranks would have had the same number of passes"
    one, many = read_log(tmp_path / "one"), read_log(tmp_path / "many")
    assert many[0] == pytest.approx(one[0], abs=1e-5, rel=2e-5)
    if module is sft:  # in RL, rounding may change a sampled token after the first step
        assert many[1] == pytest.approx(one[1], abs=1e-3, rel=1e-3)


@pytest.mark.parametrize("module, given", [(sft, flags), (rl, rl_flags)])
def test_size_of_passes_changes_only_rounding(module, given, writer_dir, world, tmp_path, monkeypatch):
    """The log lines of a step with a pass for each row, with some passes, and with one."""
    found = []
    for pass_tokens in (1, 200, 100_000):
        out = tmp_path / str(pass_tokens)
        run_here(module, given(writer_dir, world, out, steps=1, pass_tokens=pass_tokens), monkeypatch)
        (line,) = read_log(out)
        found.append(line)
    assert found[0] == pytest.approx(found[2], abs=1e-6, rel=1e-5)
    assert found[1] == pytest.approx(found[2], abs=1e-6, rel=1e-5)


@pytest.mark.parametrize("module, flag, new", [
    (sft, "--micro_batch", "--pass_tokens"), (rl, "--update_batch", "--pass_tokens"), (ev, "--batch_size", "--slots"),
])  # fmt: skip
def test_flags_of_earlier_versions(module, flag, new):
    """A run that gives one of them is told the new name."""
    for given in ([flag, "3"], [f"{flag}=3"]):
        with pytest.raises(SystemExit, match=f"unknown: {flag}.3. {flag} is now {new}"):
            parse_args(module.Settings, module.PRESETS, given)
