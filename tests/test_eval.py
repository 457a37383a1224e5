"""eval.py: metrics against published values and hand-made cases, modes on tiny vectors, dead models, complete runs."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import changed_copy, picture
from safetensors.torch import load_file, save_file

import eval as ev
import support.cache as cache_file
from data import encode, encode_input
from model import Embedder, Rollouts
from support.images import open_image, white_image
from support.report import model_names, paired_change

DATA = Path(__file__).parent / "data"
WORDS = ["red", "blue", "green", "white"]
X, Y = [1.0, 0.0], [0.0, 1.0]


def test_metrics_equal_the_published_code():
    """Every metric case has the published value. Graded labels keep their own grades."""
    cases = json.loads((DATA / "metric_cases.json").read_text())["cases"]
    assert cases
    for case in cases:
        want = case["scores"] | case.get("ndcg_if_rel_kept_aligned", {})
        got = ev.ranking_metrics(case["prediction"], case["label"], case["rel_scores"])
        assert got == pytest.approx(want, abs=1e-12), (case["id"], case["kind"])
        if case["kind"] == "graded_int":  # the published tables: labels pass through a set
            query = {"labels": case["label"], "grades": case["rel_scores"]}
            ranking = ev.Ranking([case["prediction"]], [True], 0, {})
            got = ev.published_ndcg(two_query_task(queries=[query]), ranking)
            assert got == pytest.approx({name: case["scores"][name] for name in got}, abs=1e-12) and len(got) == 6


def test_ties_keep_the_candidates_order():
    """The published tie cases, ranked from one-dimensional embeddings, give the stable order and its scores. Copies of
    one embedding in 300 columns never swap: rounding of the matrix product does not order them."""
    cases = [c for c in json.loads((DATA / "metric_cases.json").read_text())["cases"] if "similarities" in c]
    assert cases
    for case in cases:
        candidates = np.array(case["similarities"], np.float32)[:, None]
        ok = np.ones(len(candidates), bool)
        ranked = ev.rank_candidates(np.ones((1, 1), np.float32), candidates, ok[:1], ok, depth=len(ok))[0]
        assert ranked == case["order_stable"]
        got = ev.ranking_metrics([case["candidates"][i] for i in ranked], case["label"], case["rel_scores"])
        assert got == pytest.approx(case["scores_if_stable"], abs=1e-12)
    rng = np.random.default_rng(0)
    distinct, copies = rng.standard_normal((7, 65)).astype(np.float32), rng.integers(0, 7, 300)
    queries, ok = rng.standard_normal((20, 65)).astype(np.float32), np.ones(300, bool)
    for ranked in ev.rank_candidates(queries, distinct[copies], ok[:20], ok, depth=300):
        for which in range(7):
            assert [i for i in ranked if copies[i] == which] == np.flatnonzero(copies == which).tolist()


def test_aggregation_case():
    """Means of groups, modalities and of the 78 tasks of a published model."""
    case = json.loads((DATA / "aggregation_case.json").read_text())
    tasks = {name: {**t, "gen": {t["main_metric"]: t["score"]}} for name, t in case["tasks"].items()}
    got = ev.aggregate(tasks)
    assert {g: row["gen"] for g, row in got["groups"].items()} == pytest.approx(case["groups"])
    assert {m: row["gen"] for m, row in got["modalities"].items()} == pytest.approx(case["modalities"])
    assert got["overall"]["gen"] == pytest.approx(case["overall"])
    del tasks["CIRR"]
    assert ev.aggregate(tasks)["overall"] is None  # 77 of 78: the mean would look like a published one


def test_four_by_four_with_ties():
    """Four queries, four candidates, by hand. b and c have equal embeddings, so b ranks before c when they tie."""
    e = np.eye(3, dtype=np.float32)
    candidates = np.stack([e[0], e[1], e[1], e[2]])  # a b c d
    queries = np.stack([e[0], e[1], (e[1] + e[2]) / 2, e[0] + e[1] + e[2]])
    ok = np.ones(4, bool)
    ranked = ev.rank_candidates(queries, candidates, ok, ok)
    assert ["".join("abcd"[i] for i in row) for row in ranked] == ["abcd", "bcad", "bcda", "abcd"]
    m = ev.ranking_metrics(list("bcad"), ["c", "d"], grades=[1, 3])
    dcg, ideal = 1 / math.log2(3), 3 + 1 / math.log2(3)
    assert m["hit@1"] == 0 and m["hit@5"] == 1
    assert m["ndcg_linear@1"] == 0
    assert m["ndcg_linear@5"] == pytest.approx((dcg + 3 / math.log2(5)) / ideal)
    assert m["ndcg_exponential@5"] == pytest.approx((dcg + 7 / math.log2(5)) / (7 + 1 / math.log2(3)))
    assert m["precision@5"] == pytest.approx(2 / 5) and m["recall@5"] == 1
    assert m["f1@5"] == pytest.approx(4 / 7)
    assert m["map@5"] == pytest.approx((1 / 2 + 2 / 4) / 2) and m["mrr@10"] == 1 / 2
    # a surplus grade is an error, a repeated label counts once, with its higher grade, and a bare key is one label
    with pytest.raises(ValueError, match="2 grades for 1 labels"):
        ev.ranking_metrics(["a"], ["a"], [1, 2])
    assert ev.ranking_metrics(["b", "a"], ["a", "a", "b"], [1, 3, 2]) == ev.ranking_metrics(
        ["b", "a"], ["b", "a"], [2, 3])  # fmt: skip
    assert ev.ranking_metrics([7, 8], 8) == ev.ranking_metrics(["7", "8"], "8")
    assert list(ev.ranking_metrics([], ["a"])) == ev.METRICS


def test_invalid_generations_are_misses():
    """An invalid query ranks nothing and an invalid candidate is not ranked, even if all are. Lists keep repeats. By
    hand, query 0 is NaN and candidate 1 is infinite: the others rank as without them."""
    x, ok, no = np.eye(3, dtype=np.float32), np.ones(3, bool), np.zeros(3, bool)
    assert ev.rank_candidates(x, x, np.array([True, False, True]), np.array([False, True, True])) == [
        [1, 2], [], [2, 1]]  # fmt: skip
    assert ev.rank_candidates(x, x, ok, no) == [[], [], []]
    lists = [np.array([2, 0, 0]), np.array([2]), np.array([1, 0])]
    assert ev.rank_candidates(x, x, ok, ok, lists) == [[0, 0, 2], [2], [1, 0]]
    c, q = np.eye(3), np.array([[1, 0, 0.1], [0, 1, 0.5], [0, 0.1, 1]])
    q[0], c[1] = np.nan, [0, np.inf, 0]
    assert ev.rank_candidates(q, c, ok, ok) == [[], [2, 0], [2, 0]]
    assert ev.rank_candidates(q, c, ok, ok, [np.array([0, 1, 2])] * 3, depth=1) == [[], [2], [2]]


@pytest.mark.parametrize("n,c,k", [(4, 0, 2), (4, 1, 1), (4, 1, 2), (5, 2, 2), (6, 3, 4), (6, 5, 2), (4, 4, 4)])
def test_pass_at_k_equals_enumeration(n, c, k):
    """The share of all k-subsets of n samples that contain one of the first c."""
    subsets = list(itertools.combinations(range(n), k))
    assert ev.pass_at_k(n, c, k) == pytest.approx(sum(min(s) < c for s in subsets) / len(subsets))


def two_query_task(**changes):
    query = {"input": {"text": ""}, "grades": None, "candidates": None}
    fields = dict(name="t", modality="image", group="G", eval_type="global", main_metric="hit@1",
                  queries=[query | {"labels": ["a"]}, query | {"labels": ["b"]}],
                  candidates={"a": {}, "b": {}})  # fmt: skip
    return ev.Task(**(fields | changes))


def arrays(gen=((X,), (Y,)), disc=(X, Y), valid=None):
    gen = np.array(gen, np.float32)  # [N, S, D]
    out = {"gen": gen, "valid": np.ones(gen.shape[:2], bool) if valid is None else np.array(valid),
           "problem": np.array([""] * len(gen))}  # fmt: skip
    return out if disc is None else out | {"disc": np.array(disc, np.float32)}


def test_modes_by_hand():
    """Query 0 is right in gen only, query 1 in disc only: each mode scores 1/2, the oracle 1. Mixed modes swap axes. If
    disc prefers a by far and gen prefers b by little, fused ranks a first, as the surer of the two does."""
    queries, candidates = arrays([[X], [X]], disc=[Y, Y]), arrays()  # gen: right, wrong; disc: wrong, right
    entry, columns, _ = ev.score_task(two_query_task(), queries, candidates)
    assert [entry[m]["hit@1"] for m in ("disc", "gen", "oracle")] == [0.5, 0.5, 1.0]
    assert columns["gen"] == [1, 0] and columns["disc"] == [0, 1] and columns["oracle"] == [1, 1]
    assert "pass@k" not in entry
    columns = ev.score_task(two_query_task(), queries, arrays(disc=[Y, X]))[1]  # disc candidates the wrong way round
    assert columns["gen_disc"] == [0, 1]  # gen queries say x, which is now candidate b
    assert columns["disc_gen"] == [0, 1]  # disc queries say y, which is gen candidate b
    columns = ev.score_task(two_query_task(), arrays([[[0.6, 0.8]], [[0.0, 1.0]]]), candidates)[1]
    assert columns["gen"] == [0, 1] and columns["disc"] == columns["fused"] == columns["oracle"] == [1, 1]


def test_samples_by_hand():
    """Four samples with 1 and 2 hits, one of them invalid: pass@k from the counts."""
    valid = [[True] * 4, [True, True, True, False]]
    sampled = arrays([[X, Y, Y, Y], [Y, Y, X, [0.0, 0.0]]], disc=None, valid=valid)
    entry, _, _ = ev.score_task(two_query_task(), arrays(), arrays(), sampled)
    assert list(entry["pass@k"]) == ["1", "2", "4"]
    assert entry["pass@k"]["1"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert entry["pass@k"]["2"] == pytest.approx((3 / 6 + 5 / 6) / 2)
    assert entry["pass@k"]["4"] == 1.0


def test_fused_ranks_by_the_mean_of_both_cosines():
    """One dot product of the concatenated halves orders the candidates as (cos_disc + cos_gen) / 2 does."""
    rng = np.random.default_rng(0)
    queries, candidates = (
        arrays(unit(rng.standard_normal((n, 1, 9))), disc=unit(rng.standard_normal((n, 9)))) for n in (5, 40)
    )
    fused = [ev.greedy_sides(side)["fused"] for side in (queries, candidates)]
    assert np.allclose(np.linalg.norm(fused[0].embeddings, axis=1), 1)
    want = (queries["disc"] @ candidates["disc"].T + queries["gen"][:, 0] @ candidates["gen"][:, 0].T) / 2
    assert np.allclose(fused[0].embeddings @ fused[1].embeddings.T, want, atol=1e-6)
    ranked = ev.rank_candidates(fused[0].embeddings, fused[1].embeddings, fused[0].ok, fused[1].ok, depth=40)
    assert ranked == np.argsort(-want, axis=1).tolist()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_fused_without_a_gen_embedding_is_disc_alone():
    """Query 1 and candidate a have no <gen_emb>: gen misses both queries, disc none, and oracle and fused take disc.
    Such a candidate has half of its disc cosine in fused. A query without a disc embedding is a miss."""
    nan = [math.nan] * 2
    for lost_query, lost_candidate in ((Y, X), (nan, nan)):
        queries = arrays([[X], [lost_query]], valid=[[True], [False]])
        candidates = arrays([[lost_candidate], [Y]], valid=[[False], [True]])
        entry, columns, _ = ev.score_task(two_query_task(), queries, candidates)
        assert columns["gen"] == [0, 0] and columns["disc"] == columns["oracle"] == columns["fused"] == [1, 1]
        assert columns["gen_disc"] == [1, 0] and columns["disc_gen"] == [0, 1]
        assert entry["gen"]["recall@10"] == 0 and entry["tied"]["fused"] == 0
    near = arrays([[nan], [[0.8, 0.6]]], disc=[X, [0.8, 0.6]], valid=[[False], [True]])  # a: 1 / 2 against 0.8
    assert ev.score_task(two_query_task(), arrays(), near)[1]["fused"] == [0, 1]
    queries["disc"][1] = math.nan
    assert ev.score_task(two_query_task(), queries, candidates)[1]["fused"] == [1, 0]


def test_unreadable_inputs_and_labels_outside_the_list_are_misses():
    """An unreadable image has no disc embedding either, so the oracle misses too. A query of a local task ranks its own
    candidates only. A label outside the list is a miss."""
    queries, candidates = arrays(), arrays()
    queries["problem"], queries["valid"][1] = np.array(["", "q.jpg: truncated"]), False
    columns = ev.score_task(two_query_task(), queries, candidates)[1]
    assert columns["disc"] == columns["gen"] == columns["oracle"] == columns["disc_gen"] == [1, 0]
    candidates["problem"] = np.array(["c.jpg: truncated", ""])
    assert ev.score_task(two_query_task(), queries, candidates)[1]["disc"] == [0, 0]
    local = two_query_task(eval_type="local")
    local.queries[0]["candidates"], local.queries[1]["candidates"] = ["b"], ["b", "a"]
    assert ev.score_task(local, arrays(), arrays())[1]["disc"] == [0, 1]


def test_graded_task_has_the_published_value_beside_ours():
    """Labels 9 and 8 pass through a set, which yields 8 first, and the grades 3 and 1 do not: 8 gets the 3."""
    task = two_query_task(name="ViDoSeek-doc", main_metric="ndcg_linear@5", candidates={9: {}, 8: {}})
    for query in task.queries:
        query |= {"labels": [9, 8], "grades": [3, 1]}
    entry, *_ = ev.score_task(task, arrays(), arrays())
    low = (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    assert entry["gen"]["ndcg_linear@5"] == pytest.approx((1 + low) / 2)  # query 0 ranks 9, 8; query 1 ranks 8, 9
    assert entry["published_ndcg"]["gen"]["ndcg_linear@5"] == pytest.approx((low + 1) / 2)
    assert entry["gen"]["ndcg_linear@1"] == pytest.approx((1 + 1 / 3) / 2)
    assert list(entry["published_ndcg"]) == ["disc", "gen", "fused", "gen_disc", "disc_gen"]


def test_paired_change():
    """By hand: the mean of the tasks' means, and the standard error from the variance of the paired differences."""
    first = {"a": [0, 0, 1, 1], "b": [0, 1]}
    last = {"a": [1, 0, 1, 1], "b": [1, 1]}
    change, error = paired_change(first, last)
    assert change == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert error == pytest.approx(math.sqrt((1 / 4) / 4 + (1 / 2) / 2) / 2)
    assert math.isnan(paired_change({"a": [0]}, {"a": [1]})[1])


def write_tasks(root):
    """Write two tasks of one tiny world. cls is global, local_t is local, and they share inputs."""
    words = ["red star", "blue ring", "green moon", "white sun"]
    candidates = {word: {"text": word} for word in words}
    candidates["red star again"] = {"text": "red star"}  # the same content under two keys
    rows = [{"input": {"text": f"find {w}", "images": ["images/x.png"]}, "labels": [w], "grades": None,
             "candidates": None} for w in words]  # fmt: skip
    local = [row | {"candidates": words} for row in rows[:2]] + [
        rows[2] | {"labels": ["not there"], "candidates": words[:2]}]  # fmt: skip
    base = {"modality": "image", "group": "I-CLS", "main_metric": "hit@1", "candidates": candidates}
    (root / "tasks" / "test").mkdir(parents=True)
    for name, kind, queries in (("test/cls", "global", rows), ("test/local_t", "local", local)):
        task = base | {"name": name, "eval_type": kind, "queries": queries}
        (root / "tasks" / f"{name}.json").write_text(json.dumps(task))


def test_model_names():
    """The name is that of the folder, with its parents if two models would share a folder of results."""
    assert model_names(["runs/toy/sft", "runs/toy/rl/"]) == ["sft", "rl"]
    assert model_names(["a/x/rl", "b/x/rl"]) == ["a-x-rl", "b-x-rl"]
    with pytest.raises(SystemExit, match="twice"):
        model_names(["a/rl", "a/rl/"])


def generate_by_text(self, prompts, *, G=1, temperature=0.0, max_new_tokens=512, slots=8, pass_tokens=0):
    """Yield embeddings from a hash of the text: "find w" is near w, samples scatter, a "moon" has no <gen_emb>."""
    for prompt in prompts:
        text = self.tokenizer.decode(prompt.row.ids).split("<|vision_end|>")[-1].split("\n<disc_emb>")[0]
        word = text.removeprefix("find ")
        READ.append((G, text))
        at = torch.tensor(np.random.default_rng(list(word.encode())).standard_normal(128), dtype=torch.float32)
        noise = torch.tensor(np.random.default_rng(prompt.seed).standard_normal((G, 128)), dtype=torch.float32)
        gen = F.normalize(at + temperature * noise, dim=-1)
        valid = torch.full((G,), "moon" not in word)
        ids = self.tokenizer(f"<think>{word}</think>").input_ids
        logp = [[0.0] * len(ids)] * G
        yield prompt, Rollouts(F.normalize(at, dim=-1), gen * valid[:, None], valid, [ids] * G, logp, [0] * G)


def two_models(root, tiny_dir, *flags):
    """Write two models and the tasks of write_tasks() with their image, and return the arguments of eval.py."""
    write_tasks(root)
    (root / "images").mkdir()
    picture(0).save(root / "images/x.png")
    models = [shutil.copytree(tiny_dir, root / name) for name in ("sft", "rl")]
    argv = ["--model", *models, "--root", root, "--out", root / "out", "--samples", 4, "--workers", 0, *flags]
    return list(map(str, argv))


READ = []  # (samples, text) of every input that was embedded


def test_complete_run(tmp_path, tiny_dir, monkeypatch, capsys):
    """The files have their keys, inputs are embedded once over all tasks, "moon" is a miss, both tables are printed. A
    second run embeds nothing and has the same scores."""
    monkeypatch.setattr(Embedder, "generate", generate_by_text)
    run, out = two_models(tmp_path, tiny_dir, "--slots", "1"), tmp_path / "out"
    weights = load_file(tmp_path / "rl/model.safetensors")
    norm = next(name for name in weights if name.endswith("norm.weight"))
    save_file(weights | {norm: 2 * weights[norm]}, tmp_path / "rl/model.safetensors", {"format": "pt"})
    READ[:] = []
    ev.main(run)
    assert len([text for G, text in READ if G == 1]) == 2 * 8  # two models, 4 + 4 distinct inputs
    assert len([text for G, text in READ if G == 4]) == 2 * 4
    scores = json.loads((out / "rl" / "scores.json").read_text())
    assert list(scores) == ["model", "reasoner", "args", "tasks", "groups", "modalities", "overall", "encoded"]
    assert scores["model"] == "rl" and scores["args"]["samples"] == 4
    assert scores["encoded"] == {"greedy": 8, "samples": 4}
    cls = scores["tasks"]["test/cls"]
    assert set(cls) == {"modality", "group", "main_metric", "num_queries", "num_candidates", *ev.MODES, "pass@k",
                        "invalid", "unreadable", "not_finite", "tied", "tokens_per_input", "seconds"}  # fmt: skip
    assert list(cls["gen"]) == ev.METRICS and list(cls["pass@k"]) == ["1", "2", "4"]
    assert (cls["num_queries"], cls["num_candidates"], cls["invalid"], cls["unreadable"]) == (4, 5, 2, 0)
    assert cls["disc"]["hit@1"] == 1 and cls["gen"]["hit@1"] == 0.75 and cls["oracle"]["hit@1"] == 1
    assert cls["disc"]["ndcg_linear@5"] == 1  # "red star" precedes its copy in the list
    assert scores["tasks"]["test/local_t"]["disc"]["hit@1"] == pytest.approx(2 / 3)
    assert scores["overall"]["disc"] == pytest.approx((1 + 2 / 3) / 2)
    per_query = json.loads((out / "sft" / "per_query.json").read_text())
    assert per_query["test/cls"]["gen"] == [1, 1, 0, 1] and len(per_query["test/cls"]["texts"]) == 4
    printed = capsys.readouterr().out
    assert "test/local_t" in printed and "sft -> rl: change" in printed
    assert "next to published" not in printed  # own tasks are not MMEB
    assert not list(out.rglob("*.tmp"))
    READ[:] = []
    ev.main(run)
    again = json.loads((out / "rl" / "scores.json").read_text())
    assert READ == [] and again["encoded"] == {"greedy": 0, "samples": 0} and again["tasks"] == scores["tasks"]


def test_errors_of_the_command_line(tmp_path):
    """No tasks, no model folder, and samples at temperature 0: each error has a remedy."""
    with pytest.raises(SystemExit, match="data.py toy"):
        ev.main(["--root", str(tmp_path)])
    write_tasks(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        ev.main(["--root", str(tmp_path), "--model", str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="temperature"):
        ev.main(["--root", str(tmp_path), "--temperature", "0"])
    assert ev.parse_args(ev.Settings, ev.PRESETS, ["--preset", "2b"]).samples == 0


def write_local_task(root):
    """Write a local task whose lists begin with the right candidate, as published ones do."""
    queries = [{"input": {"text": f"find {w}"}, "labels": [w],
                "candidates": [w, *(x for x in WORDS if x != w)]} for w in WORDS]  # fmt: skip
    task = {"modality": "image", "group": "I-CLS", "eval_type": "local", "main_metric": "hit@1", "queries": queries,
            "candidates": {w: {"text": w} for w in WORDS}}  # fmt: skip
    (root / "tasks/test").mkdir(parents=True)
    (root / "tasks/test/local.json").write_text(json.dumps(task))


def run_local(root, model, *flags):
    """Run eval.py on the local task of a root and return the content of scores.json."""
    ev.main(list(map(str, ["--model", model, "--root", root, "--out", root / "out", "--workers", 0, *flags])))
    return json.loads((root / "out" / model.name / "scores.json").read_text())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_dead_model_does_not_score(tiny_dir, tmp_path, capsys, value):
    """Bug story: NaN compares as neither better nor worse, so a model of NaN weights kept the order of the lists, which
    begin with the right candidate: hit@1 of 100.0. Now NaN is a miss. Equal embeddings still tie, and the table says
    for how many queries."""
    write_local_task(tmp_path)
    model = changed_copy(tiny_dir, tmp_path / "dead", lambda tensors: tensors["model.norm.weight"].fill_(value))
    entry = run_local(tmp_path, model, "--max_new_tokens", 4, "--samples", 2)["tasks"]["test/local"]
    printed = capsys.readouterr().out
    if value == 0:
        assert entry["disc"]["hit@1"] == 1.0 and entry["tied"]["disc"] == 4 and entry["not_finite"] == 0
        assert "candidates tie for the first rank, so the order of the list decides, for 4 in disc" in printed
    else:
        assert entry["not_finite"] == 8 and "8 of 8 inputs have an embedding that is not finite" in printed
        assert all(entry[mode][metric] == 0 for mode in ev.MODES for metric in ev.METRICS)
        assert set(entry["pass@k"].values()) == {0.0}


def test_ties_for_the_first_place_are_counted():
    """Bug story: a dead vision tower makes all images equal, and one text more in the list hid it: hit@1 100.0. A right
    and a wrong candidate with the best score count. Two right ones, or ties below the first rank, do not."""
    same, best, low = [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]
    keys, c = ["right", "wrong", "also right", "low"], np.array([same, best, same, low])
    task = ev.Task("t", "image", "g", "local", "hit@1", [
        {"input": {}, "labels": ["right"], "grades": None, "candidates": ["right", "wrong", "low"]},
        {"input": {}, "labels": ["right", "also right"], "grades": None, "candidates": ["right", "also right", "low"]},
        {"input": {}, "labels": ["low"], "grades": None, "candidates": ["right", "wrong"]},
        {"input": {}, "labels": ["low"], "grades": None, "candidates": ["low", "right", "wrong"]},
    ], dict.fromkeys(keys, {}))  # fmt: skip
    embeddings = np.array([best, best, best, low])
    entry, *_ = ev.score_task(task, arrays(embeddings[:, None], embeddings), arrays(c[:, None], c))
    assert entry["tied"]["disc"] == 2


def test_ablation_where_nothing_is_valid(tiny_dir, tmp_path, capsys):
    """Bug story: --ablate trace of a model that never writes <gen_emb> ended in a KeyError after all the work."""
    write_local_task(tmp_path)
    run_local(tmp_path, tiny_dir, "--max_new_tokens", 2, "--ablate", "trace")
    assert "no input has a valid answer, so there is no reasoning to take out" in capsys.readouterr().out


def test_a_changed_tokenizer_config_is_embedded_again(writer_dir, tmp_path, monkeypatch):
    """Bug story (mindmeld#358): the evaluation embedded nothing and printed the old scores. After CACHE_VERSION is
    raised, no older embedding is used."""
    write_local_task(tmp_path)
    model = shutil.copytree(writer_dir, tmp_path / "model")

    def encoded():
        scores = run_local(tmp_path, model, "--samples", 0, "--max_new_tokens", 8, "--report_queries", 0)
        return scores["encoded"]["greedy"]

    assert encoded() == 8 and encoded() == 0
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 4096}))
    assert encoded() == 8 and encoded() == 0
    monkeypatch.setattr(cache_file, "CACHE_VERSION", cache_file.CACHE_VERSION + 1)
    assert encoded() == 8


@pytest.mark.parametrize("blank", [True, False])
def test_an_exported_input_is_what_the_model_reads(writer, tmp_path, blank):
    """Bug story (vllm#33167): the exported text inputs had no blank image, which the model reads there. On a server it
    got 28 points instead of 84. The file gives the ids and patches that the evaluation encodes."""
    write_local_task(tmp_path)
    file = tmp_path / "inputs.jsonl"
    ev.main(["--root", str(tmp_path), "--export", str(file), "--blank_image", str(blank)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["text"] for row in rows] == [f"{find}{word}" for find in ("find ", "") for word in WORDS]
    for row in rows:
        user = {"text": "<image>" * len(row["images"]) + row["prompt"], "images": row["images"], "video": row["video"]}
        want = encode_input(writer.tokenizer, {"text": row["text"]}, blank_image=blank)
        assert encode(writer.tokenizer, user).content == want.content
    if blank:
        assert open_image(rows[0]["images"][0]).tobytes() == white_image().tobytes()
