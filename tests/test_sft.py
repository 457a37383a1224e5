"""sft.py: the losses against loops, GradCache against one plain pass of transformers, processes, resume, refusals.

    python -m pytest tests/test_sft.py
"""

import copy
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_same_gradients,
    gradients,
    read_log,
    run_here,
    run_killed,
    run_processes,
    transformers_forward,
)
from safetensors.torch import load_file

import rl
import sft
from data import PairData
from model import Embedder
from sft import Settings, info_nce, lr_at, sft_step
from support.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from support.loop import make_optimizer, trained
from support.program import Stopped


def twin_info_nce(query, target, tau, same=None):
    """One pair, one direction, one negative at a time."""
    B, total = len(query), 0.0
    for a, b in ((query, target), (target, query)):
        for i in range(B):
            scores = [a[i] @ b[j] / tau for j in range(B) if j == i or same is None or not same[i, j]]
            total = total - (a[i] @ b[i] / tau - torch.logsumexp(torch.stack(scores), 0)) / B
    return total / 2


@pytest.mark.parametrize("B", [1, 2, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_info_nce_equals_the_loops(B, masked):
    """Value and gradients of the symmetric loss are the loop's, with and without pairs that are not negatives; the
    diagonal of same_target may be set or not."""
    g = torch.Generator().manual_seed(B)
    q, t = (F.normalize(torch.randn(B, 8, generator=g, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    same = None
    if masked:
        same = torch.rand(B, B, generator=g) < 0.4
        same = same | same.T
    got, want = info_nce(q, t, 0.05, same), twin_info_nce(q, t, 0.05, same)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (q, t)), torch.autograd.grad(want, (q, t))):
        torch.testing.assert_close(a, b)


def test_info_nce_by_hand():
    """Two orthogonal pairs at tau = 1: -log(e / (e + 1)) in both directions; the default temperature is 0.02."""
    eye = torch.eye(2)
    assert float(info_nce(eye, eye, 1.0)) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(info_nce(eye, eye.flip(0))) == pytest.approx(50.0)
    all_same = torch.ones(2, 2, dtype=torch.bool)
    assert float(info_nce(eye, eye.flip(0), 0.02, all_same)) == 0.0


# ---- GradCache against one plain pass --------------------------------------------------------------------------


def plain_step(model, pairs, tau, w, mask_same_target):
    """The paper's loss over the usable pairs with one graph: transformers' forward row by row, loops for the rest."""
    good = [pair for pair in pairs if pair.ok]
    sides, ce = {"query": [], "target": []}, []
    for side, found in sides.items():
        losses = []
        for pair in good:
            row = getattr(pair, side)
            hidden, logits = transformers_forward(model, [row])[0]
            found.append(F.normalize(hidden[[row.disc_at, row.gen_at]], dim=-1))
            logp = logits.log_softmax(-1)
            losses += [-logp[t - 1, row.ids[t]] for t in range(row.n_prompt, len(row.ids))]
        ce.append(sum(losses) / len(losses))
    q, t = torch.stack(sides["query"]), torch.stack(sides["target"])
    same = torch.tensor([[a.target_key == b.target_key for b in good] for a in good]) if mask_same_target else None
    disc, gen = (twin_info_nce(q[:, k], t[:, k], tau, same) for k in (0, 1))
    loss = w[0] * disc + w[1] * gen + w[2] * sum(ce)
    parts = dict(disc=disc, gen=gen, ce_query=ce[0], ce_target=ce[1])
    if w[3:]:  # gen queries on disc targets and the reverse
        parts["cross"] = sum(twin_info_nce(q[:, k], t[:, 1 - k], tau, same) for k in (0, 1)) / 2
        loss = loss + w[3] * parts["cross"]
    loss.backward()
    parts["loss"] = loss
    return {name: float(x.detach()) for name, x in parts.items()}


def trainable(path):
    model = Embedder.from_pretrained(path)
    tower = model.backbone.model.visual.requires_grad_(False)
    for merger in model.family.mergers(tower):
        merger.requires_grad_(True)
    return model.train()


def some_pairs(model, world, skip=False):
    """Six pairs with pictures, videos and text; two of them have the same target, one may be a skipped one."""
    data = PairData([world / "sft.json"], model.tokenizer, kind="sft", batch_size=6, seed=0, root=world,
                    family=model.family)  # fmt: skip
    pairs = [data[i] for i in (0, 1, 2, 4, 5, 8)]
    assert pairs[0].target_key == pairs[1].target_key and len({p.target_key for p in pairs}) == 4
    assert {len(p.query.grids) for p in pairs} == {1, 2} and {len(p.target.grids) for p in pairs} == {0, 1}
    if skip:
        name = pairs[3].name
        pairs[3] = replace(pairs[3], query=data.stand_in(name), target=data.stand_in(name), target_key=0, ok=False)
    return pairs


CASES = [  # micro_batch, checkpointing, skipped pair, mask_same_target, train_vision, weights
    (6, False, False, True, False, (1.0, 1.0, 1.0)),
    (3, False, True, True, False, (1.0, 0.5, 2.0)),
    (1, False, True, True, False, (1.0, 1.0, 1.0)),
    (2, True, True, True, False, (1.0, 1.0, 1.0)),
    (4, False, False, False, False, (0.3, 1.0, 1.0)),
    (2, False, True, True, True, (1.0, 1.0, 1.0)),
    (2, False, False, True, False, (1.0, 0.0, 0.0)),
    (2, False, True, True, False, (0.0, 0.0, 1.0)),
    (6, True, True, True, True, (1.0, 0.5, 2.0)),  # one micro-batch for all
    (6, False, True, True, False, (0.5, 0.0, 0.0)),
    (6, False, False, True, False, (0.0, 0.0, 1.0)),
    (2, False, True, True, False, (1.0, 0.5, 1.0, 0.7)),  # with --cross_weight
    (4, False, False, True, False, (0.0, 0.0, 0.0, 1.0)),
]


@pytest.mark.parametrize("micro_batch, checkpointing, skip, mask, vision, w", CASES)
def test_step_equals_one_plain_pass(writer_dir, world, micro_batch, checkpointing, skip, mask, vision, w):
    """Loss parts and all gradients of a step in micro-batches are those of one pass over the whole batch; a skipped
    pair is neither row nor column of the contrast nor part of the next-token means."""
    model = trainable(writer_dir)
    model.backbone.model.visual.requires_grad_(True) if vision else None
    pairs = some_pairs(model, world, skip)
    want = plain_step(model, pairs, 0.1, w, mask)
    want_gradients = gradients(model)
    model.zero_grad()
    if checkpointing:
        model.backbone.activation_checkpointing_enable({"use_reentrant": False})
    args = Settings(micro_batch=micro_batch, tau=0.1, mask_same_target=mask, train_vision=vision,
                    w_disc=w[0], w_gen=w[1], w_ce=w[2], cross_weight=sum(w[3:]))  # fmt: skip
    parts, _ = sft_step(model, pairs, args)
    for name in want:
        if name.startswith("ce") and not w[2] or name in ("disc", "gen") and not (w[0] or w[1] or w[3:]):
            continue  # not computed, 0 in the log
        assert parts[name] == pytest.approx(want[name], abs=1e-5), name
    got = gradients(model)
    assert_same_gradients(got, want_gradients, rtol=1e-5)
    seen = {name for name in got if "visual.blocks" in name or "patch_embed" in name}
    assert bool(seen) == vision and any("merger" in name for name in got)


def test_content_of_a_skipped_pair_does_not_matter(writer_dir, world):
    """Whatever stands in for a skipped pair, loss and gradients are the same."""
    model, found = trainable(writer_dir), []
    for stand_in in (True, False):
        pairs = some_pairs(model, world, skip=stand_in)
        pairs[3] = replace(pairs[3], ok=False)
        model.zero_grad()
        parts, _ = sft_step(model, pairs, Settings(micro_batch=6, tau=0.1))
        found.append((parts, gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert_same_gradients(found[0][1], found[1][1])


@pytest.mark.parametrize("micro_batch", [2, 6])
def test_a_batch_of_skipped_pairs(writer_dir, world, micro_batch):
    """A batch without one usable pair (a wrong --media_root) stops the run with the first reason: a mean over nothing
    would be NaN."""
    model = trainable(writer_dir)
    pairs = [replace(pair, ok=False, reason="gone.png") for pair in some_pairs(model, world)]
    with pytest.raises(Stopped, match="no pair.*gone.png"):
        sft_step(model, pairs, Settings(micro_batch=micro_batch))


def test_lr_at():
    """Warm-up over 3 of 100 steps, the peak, the middle and the end of the cosine, and its floor."""
    lr = [lr_at(s, steps=100, lr=1.0, warmup=0.03) for s in range(100)]
    assert lr[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1]) and lr[3:] == sorted(lr[3:], reverse=True)
    assert 0 < lr[-1] < 1e-3 and lr_at(51.5, steps=100, lr=1.0, warmup=0.03) == pytest.approx(0.5)
    assert lr_at(99, steps=100, lr=2.0, warmup=0.0, floor=0.1) == pytest.approx(0.2, abs=1e-3)


def test_tau_at():
    """The temperature falls geometrically and then stays; without steps it is tau from the start."""
    fall = [sft.tau_at(step, start=0.2, tau=0.02, steps=4) for step in range(7)]
    assert fall == pytest.approx([0.2 * 10 ** -(min(s, 4) / 4) for s in range(7)]) and fall[-1] == pytest.approx(0.02)
    assert sft.tau_at(0, start=0.2, tau=0.03, steps=0) == 0.03


# ---- the script ------------------------------------------------------------------------------------------------


def flags(tiny_dir, world, out, **more):
    given = dict(model=tiny_dir, data=world / "sft.json", media_root=world, out=out, steps=2, batch_size=4,
                 micro_batch=2, tau_steps=0, lr=1e-3, tau=0.1, workers=0, save_every=100, cache=world / "cache",
                 max_skipped=1) | more  # fmt: skip
    return [x for key, value in given.items() for x in (f"--{key}", value)]


def weights(out):
    return load_file(out / "model.safetensors")


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("micro_batch", [1, 3])  # 3: one micro-batch is a process's whole share
def test_two_processes_equal_one(tiny_dir, world, tmp_path, monkeypatch, micro_batch):
    """With two processes the loss parts and the gradient norm of the first step are those of one process
    to 1e-5, and the final weights agree; a skipped pair and a text-only micro-batch are in the data."""
    rows = json.loads((world / "sft.json").read_text())
    rows[7]["qry"] = rows[7]["qry"] | {"image": ["images/0.png", "images/gone.png"]}
    (world / "sft_gone.json").write_text(json.dumps(rows))
    more = dict(data=world / "sft_gone.json", batch_size=6, micro_batch=micro_batch, lr=1e-4)
    run_here(sft, flags(tiny_dir, world, tmp_path / "one", **more), monkeypatch)
    run_processes(sft, flags(tiny_dir, world, tmp_path / "two", **more))
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) == 2 and sum(line["skipped"] for line in one) == 1
    for a, b in zip(one, two):
        tolerance = 1e-5 if a["step"] == 1 else 1e-3
        assert b == pytest.approx(a, abs=tolerance, rel=tolerance)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    # Adam's first steps are lr * sign(gradient): where a gradient is rounding noise the sign may differ
    away = {name: (a[name] - b[name]).abs() for name in a}
    assert a.keys() == b.keys() and max(float(x.max()) for x in away.values()) <= 4.1e-4
    assert sum(int((x > 1e-5).sum()) for x in away.values()) < 0.01 * sum(x.numel() for x in away.values())
    assert (tmp_path / "two/skipped.jsonl").read_text() == (tmp_path / "one/skipped.jsonl").read_text()


def test_run_writes_its_folder(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """After a run the ViT's blocks are unchanged and merger and language model are not; log, args and the model's
    files are there; a second run says that the first is finished; the same seed in another folder gives the same
    log."""
    run_here(sft, flags(tiny_dir, world, tmp_path / "a"), monkeypatch)
    n_trained = sum(p.numel() for p in trainable(tiny_dir).parameters() if p.requires_grad)
    assert f"{n_trained:,} trained parameters" in capsys.readouterr().out
    before, after = Embedder.from_pretrained(tiny_dir).backbone.state_dict(), Embedder.from_pretrained(tmp_path / "a")
    for name, new in after.backbone.state_dict().items():
        frozen = ".visual." in name and ".merger." not in name
        assert torch.equal(new, before[name]) == frozen, name
    args = json.loads((tmp_path / "a/args.json").read_text())
    assert args["settings"]["steps"] == 2 and args["finished"] and {"command", "commit", "torch"} <= args.keys()
    assert [line["step"] for line in read_log(tmp_path / "a")] == [1, 2]
    keys = {"loss", "disc", "gen", "ce_query", "ce_target", "lr", "grad_norm", "skipped"}
    assert keys <= read_log(tmp_path / "a")[0].keys()

    with monkeypatch.context() as patch:
        patch.setattr(sft, "sft_step", lambda *_: pytest.fail("a finished run must not train"))
        run_here(sft, flags(tiny_dir, world, tmp_path / "a"), patch)
        shutil.rmtree(tmp_path / "a/checkpoints")  # with them it would be extended
        with pytest.raises(SystemExit, match="steps 2 -> 3"):
            run_here(sft, flags(tiny_dir, world, tmp_path / "a", steps=3), patch)
    run_here(sft, flags(tiny_dir, world, tmp_path / "b"), monkeypatch)
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    run_here(sft, flags(tiny_dir, world, tmp_path / "c", seed=1), monkeypatch)
    assert read_log(tmp_path / "c") != read_log(tmp_path / "a")


def test_micro_batch_does_not_change_the_log(tiny_dir, world, tmp_path, monkeypatch):
    """--micro_batch changes time and memory only."""
    for n in (1, 4):
        run_here(sft, flags(tiny_dir, world, tmp_path / str(n), micro_batch=n, steps=1), monkeypatch)
    (a,), (b,) = read_log(tmp_path / "1"), read_log(tmp_path / "4")
    assert a == pytest.approx(b, abs=1e-5, rel=1e-5)


def test_resume_is_bit_equal(tiny_dir, world, tmp_path, monkeypatch):
    """Six steps are three steps, a kill in the fifth and a resume: the weights are the same bits, the log has each
    step once, and what the killed run had logged beyond its checkpoint is gone."""
    run_here(sft, flags(tiny_dir, world, tmp_path / "whole", steps=6, save_every=3), monkeypatch)
    argv = flags(tiny_dir, world, tmp_path / "cut", steps=6, save_every=3)
    run_killed(sft, "sft_step", 5, argv, monkeypatch)
    assert not (tmp_path / "cut/model.safetensors").exists() and len(read_log(tmp_path / "cut")) == 4
    run_here(sft, argv + ["--resume", "auto"], monkeypatch)
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "cut")
    assert [line["step"] for line in read_log(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    # a named checkpoint goes on in another folder (this was refused once, though the message itself advises it)
    again = flags(tiny_dir, world, tmp_path / "again", steps=6) + ["--resume", tmp_path / "whole/checkpoints/step-3"]
    run_here(sft, again, monkeypatch)
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "again"))


def test_refusals(tiny_dir, world, tmp_path, monkeypatch):
    """--resume of a folder without a checkpoint, changed settings and unknown presets end with a clear message."""
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        run_here(sft, flags(tiny_dir, world, tmp_path / "x") + ["--resume", tmp_path / "nothing"], monkeypatch)
    run_here(sft, flags(tiny_dir, world, tmp_path / "a", save_every=1), monkeypatch)
    (tmp_path / "a/args.json").unlink()  # as if killed before the end
    with pytest.raises(SystemExit, match="tau 0.1 -> 0.2"):
        run_here(sft, flags(tiny_dir, world, tmp_path / "a", tau=0.2), monkeypatch)
    with pytest.raises(SystemExit, match="toy"):
        run_here(sft, ["--preset", "3b"], monkeypatch)
    with pytest.raises(ValueError, match="fills a batch of 8"):
        run_here(sft, flags(tiny_dir, world, tmp_path / "b", batch_size=8), monkeypatch)


def test_discriminative_baseline(tiny_dir, world, tmp_path, monkeypatch):
    """DUME, --w_gen 0 --w_ce 0, trains on rows whose answers have no <gen_emb>, and only its loss is in the sum."""
    rows = json.loads((world / "sft.json").read_text().replace("<answer>red star<gen_emb>", "x"))
    (world / "dume.json").write_text(json.dumps(rows))
    weights = {"w_disc": 1, "w_gen": 0, "w_ce": 0}
    run_here(sft, flags(tiny_dir, world, tmp_path, data=world / "dume.json", **weights), monkeypatch)
    for line in read_log(tmp_path):
        assert line["loss"] == pytest.approx(line["disc"]) and line["loss"] > 0 and line["grad_norm"] > 0
    with pytest.raises(ValueError, match="<gen_emb>"):
        run_here(sft, flags(tiny_dir, world, tmp_path / "full", data=world / "dume.json"), monkeypatch)


# ---- checkpoints -----------------------------------------------------------------------------------------------


def small(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return model, optimizer


def train(model, optimizer, steps):
    for k in range(steps):
        model(torch.full((2, 3), k + 1.0)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_checkpoint_restores_model_and_optimizer(tmp_path):
    """A loaded checkpoint goes on bit for bit, frozen parameters and AdamW's counters included; only `keep` stay."""
    model, optimizer = small()
    for step in (1, 2, 3, 10):
        train(model, optimizer, 1)
        save_checkpoint(tmp_path, model, optimizer, step, {"a": 1}, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 10]
    other, other_optimizer = small(1)
    assert load_checkpoint("auto", tmp_path, other, other_optimizer, {"a": 1}) == 10
    train(model, optimizer, 3)
    train(other, other_optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert load_checkpoint("none", tmp_path, *small(), {"a": 1}) == 0
    assert load_checkpoint(str(tmp_path / "checkpoints/step-3"), tmp_path, *small(), {"a": 1}) == 3
    with pytest.raises(SystemExit, match="a 1 -> 2"):
        load_checkpoint("auto", tmp_path, *small(), {"a": 2})


@pytest.mark.parametrize("fused", [False, True])
def test_checkpoint_of_the_other_optimizer(tmp_path, fused):
    """A checkpoint of AdamW's fused form, which GPUs run, goes on in the plain one and the reverse."""
    model, _ = small()
    args = SimpleNamespace(lr=0.1, beta2=0.999)
    optimizer = make_optimizer(model, args)
    assert optimizer.defaults["fused"] is False  # on the CPU
    forms = {False: optimizer, True: torch.optim.AdamW(trained(model), args.lr, weight_decay=0.0, fused=True)}
    train(model, forms[fused], 2)
    save_checkpoint(tmp_path, model, forms[fused], 2, {})
    assert load_checkpoint("auto", tmp_path, model, forms[not fused], {}) == 2
    other = copy.deepcopy(model)
    same = torch.optim.AdamW(trained(other), args.lr, weight_decay=0.0, fused=fused)
    load_checkpoint("auto", tmp_path, other, same, {})
    train(model, forms[not fused], 3)
    train(other, same, 3)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)
    assert all(float(state["step"]) == 5 for state in forms[not fused].state.values())


def test_toy_presets_are_fp32_everywhere():
    """The README's figures are: a newcomer with a GPU must not get others."""
    assert [stage.PRESETS["toy"].get("bf16") for stage in (sft, rl)] == [False, False]


def test_starting_anew_forgets_old_checkpoints(tiny_dir, world, tmp_path, monkeypatch):
    """Bug story: --resume none over a folder with later checkpoints of another run kept those as the newest: its
    own were deleted as the oldest, and the next --resume auto took the other run's."""
    run_here(sft, flags(tiny_dir, world, tmp_path, steps=4, save_every=1, keep=2), monkeypatch)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 4]
    run_here(sft, flags(tiny_dir, world, tmp_path, steps=2, save_every=1, keep=2, tau=0.2, resume="none"), monkeypatch)
    known = list_checkpoints(tmp_path)
    assert [step for step, _ in known] == [1, 2]
    assert json.loads((known[0][1] / "meta.json").read_text())["settings"]["tau"] == 0.2
    assert np.isfinite([line["loss"] for line in read_log(tmp_path)]).all() and len(read_log(tmp_path)) == 2
