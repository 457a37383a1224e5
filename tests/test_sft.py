"""sft.py: the losses against loops, GradCache against one plain pass of transformers, processes, resume."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_same_gradients,
    die_softly,
    flags,
    gradients,
    on_call,
    read_log,
    run_here,
    run_processes,
    same_weights,
    transformers_forward,
    weights,
    with_a_missing_image,
)

import rl
import sft
from data import PairData
from model import Embedder
from sft import Settings, info_nce, lr_at, sft_step
from support.files import write_rows
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
    """Value and gradients of the symmetric loss are those of a loop, with and without pairs that are not negatives."""
    g = torch.Generator().manual_seed(B)
    q, t = (F.normalize(torch.randn(B, 8, generator=g, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    same = torch.rand(B, B, generator=g) < 0.4
    same = same | same.T if masked else None
    got, want = info_nce(q, t, 0.05, same), twin_info_nce(q, t, 0.05, same)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (q, t)), torch.autograd.grad(want, (q, t))):
        torch.testing.assert_close(a, b)


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


CASES = [  # pass_tokens, checkpointing, skipped pair, mask_same_target, train_vision, weights
    (10000, False, False, True, False, (1.0, 1.0, 1.0)),
    (330, False, True, True, False, (1.0, 0.5, 2.0)),
    (1, False, True, True, False, (1.0, 1.0, 1.0)),
    (220, True, True, True, False, (1.0, 1.0, 1.0)),
    (440, False, False, False, False, (0.3, 1.0, 1.0)),
    (220, False, True, True, True, (1.0, 1.0, 1.0)),
    (220, False, False, True, False, (1.0, 0.0, 0.0)),
    (220, False, True, True, False, (0.0, 0.0, 1.0)),
    (10000, True, True, True, True, (1.0, 0.5, 2.0)),  # one micro-batch for all
    (10000, False, True, True, False, (0.5, 0.0, 0.0)),
    (10000, False, False, True, False, (0.0, 0.0, 1.0)),
    (220, False, True, True, False, (1.0, 0.5, 1.0, 0.7)),  # with --cross_weight
    (440, False, False, True, False, (0.0, 0.0, 0.0, 1.0)),
]


@pytest.mark.parametrize("pass_tokens, checkpointing, skip, mask, vision, w", CASES)
def test_step_equals_one_plain_pass(writer_dir, world, pass_tokens, checkpointing, skip, mask, vision, w):
    """All results of a step in micro-batches are those of one pass. A skipped pair is in no sum."""
    model = trainable(writer_dir)
    model.backbone.model.visual.requires_grad_(True) if vision else None
    pairs = some_pairs(model, world, skip)
    want = plain_step(model, pairs, 0.1, w, mask)
    want_gradients = gradients(model)
    model.zero_grad()
    if checkpointing:
        model.backbone.activation_checkpointing_enable({"use_reentrant": False})
    args = Settings(pass_tokens=pass_tokens, tau=0.1, mask_same_target=mask, train_vision=vision,
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
    """Whatever stands in for a skipped pair, the results are the same. A batch of skipped pairs stops the run."""
    model, found = trainable(writer_dir), []
    for stand_in in (True, False):
        pairs = some_pairs(model, world, skip=stand_in)
        pairs[3] = replace(pairs[3], ok=False)
        model.zero_grad()
        parts, _ = sft_step(model, pairs, Settings(pass_tokens=10_000, tau=0.1))
        parts.pop("padding")
        found.append((parts, gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert_same_gradients(found[0][1], found[1][1])
    for pass_tokens in (220, 10_000):
        pairs = [replace(pair, ok=False, reason="gone.png") for pair in some_pairs(model, world)]
        with pytest.raises(Stopped, match="no pair.*gone.png"):
            sft_step(model, pairs, Settings(pass_tokens=pass_tokens))


def test_schedules_and_values_by_hand():
    """The learning rate, the temperature, the loss of two orthogonal pairs, and presets that are fp32 on GPUs too."""
    lr = [lr_at(s, steps=100, lr=1.0, warmup=0.03) for s in range(100)]
    assert lr[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1]) and lr[3:] == sorted(lr[3:], reverse=True)
    assert 0 < lr[-1] < 1e-3 and lr_at(51.5, steps=100, lr=1.0, warmup=0.03) == pytest.approx(0.5)
    assert lr_at(99, steps=100, lr=2.0, warmup=0.0, floor=0.1) == pytest.approx(0.2, abs=1e-3)
    fall = [sft.tau_at(step, start=0.2, tau=0.02, steps=4) for step in range(7)]
    assert fall == pytest.approx([0.2 * 10 ** -(min(s, 4) / 4) for s in range(7)]) and fall[-1] == pytest.approx(0.02)
    assert sft.tau_at(0, start=0.2, tau=0.03, steps=0) == 0.03
    eye = torch.eye(2)
    assert float(info_nce(eye, eye, 1.0)) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(info_nce(eye, eye.flip(0))) == pytest.approx(50.0)  # tau = 0.02
    assert float(info_nce(eye, eye.flip(0), 0.02, torch.ones(2, 2, dtype=torch.bool))) == 0.0
    assert [stage.PRESETS["toy"].get("bf16") for stage in (sft, rl)] == [False, False]


@pytest.mark.parametrize("pass_tokens", [1, 10_000])  # a row, and a process's complete share
def test_two_processes_equal_one(tiny_dir, world, tmp_path, monkeypatch, pass_tokens):
    """The first step on two ranks is one rank's to 1e-5, with a skipped pair and a text-only micro-batch."""
    more = dict(data=with_a_missing_image(world), batch_size=6, pass_tokens=pass_tokens, lr=1e-4)
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
    """Frozen blocks stay. Log, args and model are written, and the same seed gives the same log."""
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
        assert "is finished" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "a/checkpoints")  # with them it would be extended
        with pytest.raises(SystemExit, match="(?s)steps 2 -> 3.*no checkpoint to resume from"):
            run_here(sft, flags(tiny_dir, world, tmp_path / "a", steps=3), patch)
    run_here(sft, flags(tiny_dir, world, tmp_path / "b"), monkeypatch)
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    run_here(sft, flags(tiny_dir, world, tmp_path / "c", seed=1), monkeypatch)
    assert read_log(tmp_path / "c") != read_log(tmp_path / "a")


def test_resume_is_bit_equal(tiny_dir, world, tmp_path, monkeypatch):
    """Six steps are three steps, a kill in the fifth and a resume: the same bits, and the log has each step once."""
    run_here(sft, flags(tiny_dir, world, tmp_path / "whole", steps=6, save_every=3), monkeypatch)
    argv = flags(tiny_dir, world, tmp_path / "cut", steps=6, save_every=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_call(sft, "sft_step", 5, die_softly, patch.setattr)
        run_here(sft, argv, patch)
    assert not (tmp_path / "cut/model.safetensors").exists() and len(read_log(tmp_path / "cut")) == 4
    run_here(sft, argv + ["--resume", "auto"], monkeypatch)
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "cut")
    assert [line["step"] for line in read_log(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    # a named checkpoint goes on in another folder (this was refused once, though the message itself advises it)
    again = flags(tiny_dir, world, tmp_path / "again", steps=6) + ["--resume", tmp_path / "whole/checkpoints/step-3"]
    run_here(sft, again, monkeypatch)
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "again"))


def test_discriminative_baseline(tiny_dir, world, tmp_path, monkeypatch):
    """DUME, --w_gen 0 --w_ce 0, trains on rows without <gen_emb>, and only its loss is in the sum."""
    rows = json.loads((world / "sft.json").read_text().replace("<answer>red star<gen_emb>", "x"))
    (world / "dume.json").write_text(json.dumps(rows))
    weights = {"w_disc": 1, "w_gen": 0, "w_ce": 0}
    run_here(sft, flags(tiny_dir, world, tmp_path, data=world / "dume.json", **weights), monkeypatch)
    for line in read_log(tmp_path):
        assert line["loss"] == pytest.approx(line["disc"]) and line["loss"] > 0 and line["grad_norm"] > 0
    with pytest.raises(ValueError, match="<gen_emb>"):
        run_here(sft, flags(tiny_dir, world, tmp_path / "full", data=world / "dume.json"), monkeypatch)


def test_a_run_that_learns_nothing_says_so(tiny_dir, world, tmp_path, monkeypatch, capsys):
    """Bug story: with equal targets and --w_ce 0 the gradient is exactly 0, and the run ended as "saved"."""
    rows = json.loads((world / "sft.json").read_text())
    for row in rows:
        row["pos"] = rows[0]["pos"]
    write_rows(tmp_path / "same.json", rows)
    argv = flags(tiny_dir, world, tmp_path / "out", data=tmp_path / "same.json", w_ce=0, steps=11)
    run_here(sft, argv, monkeypatch)
    told = capsys.readouterr().err
    assert "step 1: the gradient is exactly 0 (1 such steps" in told and "step 10: the gradient is exactly 0" in told
    assert told.count("the gradient is exactly 0") == 2
    run_here(sft, flags(tiny_dir, world, tmp_path / "good", steps=1), monkeypatch)
    assert "the gradient is exactly 0" not in capsys.readouterr().err
