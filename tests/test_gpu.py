"""What only a GPU can show: kernels, CUDA graphs, synchronisations, memory, nccl, CPU and GPU alike. Without one it is
skipped. About two minutes on a card of 80 GB. Run: pytest tests/test_gpu.py"""

import shutil
import socket
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from bench_gpu import peak_gib, text_prompt
from bench_scale import SIZES, random_model, random_pairs, toy_tokenizer
from conftest import ROOT, encoded, generate_all, gradients, inputs, read_log, transformers_read
from safetensors.torch import load_file

import rl
import sft
from data import PairData
from model import Embedder
from support.decode import Decoder, attention_of_few_rows
from support.distributed import all_sum, distribute, end_processes, gather, start_processes, unsharded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]
CLOSE = dict(rtol=1e-3, atol=1e-4)  # fp32 on both: another order of additions


def on_gpu(path, bf16=False):
    model = Embedder.from_pretrained(path, device="cuda")
    model.bf16 = bf16
    return model


def pairs_of(model, world, kind="sft"):
    needs = ("answer", "<gen_emb>", "<disc_emb>") if kind == "sft" else ()
    data = PairData([world / f"{kind}.json"], model.tokenizer, kind=kind, batch_size=6, seed=0, root=world, needs=needs)
    return [data[i] for i in data.order[0]]


def relative(a, b):
    return float((a.float().cpu() - b.float().cpu()).norm() / b.float().norm())


@pytest.fixture(scope="module")
def real_2b():
    """The real 2B's sizes with random weights, made on the GPU in fp32, as a stage trains it."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        backbone = random_model(**SIZES["2b"])
    model = Embedder(backbone, toy_tokenizer()).to("cuda")
    backbone.config.image_token_id, backbone.config.video_token_id = model.media_ids
    backbone.model.visual.requires_grad_(False)
    model.bf16 = True
    backbone.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def test_texts_equal_the_cpus(writer, writer_dir):
    """In fp32 the GPU writes the CPU's texts, greedy and sampled, because the random numbers are drawn on the host."""
    model = on_gpu(writer_dir)
    want, got = (m.embed(inputs(), max_new_tokens=24, batch_size=3) for m in (writer, model))
    assert got.texts == want.texts
    torch.testing.assert_close((got.disc, got.gen), (want.disc, want.gen), **CLOSE)
    settings = dict(G=3, temperature=1.0, max_new_tokens=24, slots=6)
    want, got = (generate_all(m, encoded(m, inputs(), answered=False), **settings) for m in (writer, model))
    for n in want:
        assert got[n].ids == want[n].ids
        torch.testing.assert_close(got[n].gen.cpu(), want[n].gen, **CLOSE)


def test_sft_gradients_equal_the_cpus(writer_dir, world):
    """A whole SFT step: losses and gradients in fp32 to 1e-3; the bf16 gradient points the same way."""
    found = []
    for device, bf16 in (("cpu", False), ("cuda", False), ("cuda", True)):
        model = Embedder.from_pretrained(writer_dir, device=device).train()
        model.bf16 = bf16
        parts, _ = sft.sft_step(model, pairs_of(model, world), sft.Settings(pass_tokens=300))
        found.append((parts, gradients(model)))
    (cpu_parts, cpu), (gpu_parts, gpu), (_, rounded) = found
    for name, value in cpu_parts.items():
        assert gpu_parts[name] == pytest.approx(value, rel=1e-3, abs=1e-5)
    assert cpu.keys() == gpu.keys()
    for name in cpu:
        assert relative(gpu[name], cpu[name]) < 1e-3 or cpu[name].norm() < 1e-6, name
    whole, other = (torch.cat([g[name].float().cpu().flatten() for name in cpu]) for g in (cpu, rounded))
    assert torch.cosine_similarity(whole, other, 0) > 0.99


def test_rl_update_equals_the_cpus(writer_dir, world):
    """Rollouts, rewards and the gradients of a GRPO step."""
    found = []
    for device in ("cpu", "cuda"):
        model = Embedder.from_pretrained(writer_dir, device=device)
        model.backbone.model.visual.requires_grad_(False)
        reference = Embedder.from_pretrained(writer_dir, device=device).requires_grad_(False)
        args = rl.Settings(G=3, slots=12, pass_tokens=300, max_new_tokens=20, bf16=False, beta=0.1)
        pairs = pairs_of(model, world, "rl")
        rows = [pair.query for pair in pairs] + [pair.target for pair in pairs]
        model.share_vision(rows, args.pass_tokens)
        rollouts = rl.rollout(model, rows, range(len(rows)), args)
        rewards, _ = rl.rewards_of(model, rollouts, pairs, args)
        advantages = rl.group_advantages(rewards.flatten(0, 1))
        groups = [rl.Group(*group, True) for group in zip(rows, rollouts, advantages)]
        figures = rl.update(model, reference, groups, args)
        assert figures["ratio"] == pytest.approx(1.0) and figures["logp_mismatch"] < 1e-4
        found.append(([r.ids for r in rollouts], rewards.cpu(), gradients(model)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], **CLOSE)
    for name, g in found[0][2].items():
        assert relative(found[1][2][name], g) < 2e-3 or g.norm() < 1e-6, name


def test_graphs_equal_the_plain_step(writer_dir, monkeypatch):
    """Replayed and plain steps give the same tokens and states; the slots grow and rows end on the way."""
    model = on_gpu(writer_dir)
    rows = encoded(model, inputs(), answered=False)
    rng = torch.Generator().manual_seed(0)
    script = [[torch.randint(10, 200, (n,), generator=rng).tolist() for n in (300, 40, 520)] for _ in rows]
    settings = dict(G=3, script=script, slots=6)
    replayed = generate_all(model, rows, **settings)

    def plain_step(self, tokens, index, positions):  # without graphs and added rows
        self.make_room(max(index) + 1)
        return self.run(torch.tensor([tokens, index, positions]).to(self.device), max(index) + 1)

    monkeypatch.setattr(Decoder, "step", plain_step)
    plain = generate_all(model, rows, **settings)
    monkeypatch.setattr(Decoder, "run", transformers_read(model.backbone))
    theirs = generate_all(model, rows, **settings)
    for n in plain:
        for other in (plain, theirs):
            for a, b in zip(replayed[n].logp, other[n].logp):
                torch.testing.assert_close(torch.tensor(a), torch.tensor(b), **CLOSE)


@pytest.mark.parametrize("R", [1, 8, 64])
def test_attention_of_the_step(R):
    """The step's two products against attention in fp64, as exact as the kernel in whose place they stand."""
    torch.manual_seed(R)
    q = torch.randn(R, 2, 6, 128, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(2, 64, 2, 1024, 128, device="cuda", dtype=torch.bfloat16)[:, :R, :, :768]
    mask = torch.zeros(R, 1, 1, 768, device="cuda")
    mask[..., 700:] = float("-inf")
    attention = torch.nn.functional.scaled_dot_product_attention
    exact = attention(q.double(), kv[0].double(), kv[1].double(), mask.double())
    theirs = attention(q, *kv, mask.bfloat16())
    assert relative(attention_of_few_rows(q, *kv, mask), exact) < max(1.2 * relative(theirs, exact), 4e-3)


def attention_of(run):
    """Names of the attention operators that run() starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
        torch.cuda.synchronize()
    names = {event.key.removeprefix("aten::_scaled_dot_product_") for event in profile.key_averages()
             if event.key.startswith("aten::_scaled_dot_product_")}  # fmt: skip
    return {name for name in names if not name.endswith("backward")}


def test_attention_kernels(real_2b):
    """Flash without a mask, the memory-efficient kernel with one, never cuDNN's or the plain one."""
    rows = [pair.query for pair in random_pairs(2, real_2b)]
    with torch.no_grad():
        batch = real_2b.pad_rows(rows)
        read = torch.tensor([5], device="cuda")
        assert attention_of(lambda: real_2b(batch, embed_at=read)) == {"flash_attention"}
        L = batch.ids.shape[1]
        tree = batch._replace(mask=torch.ones(2, 1, L, L, dtype=torch.bool, device="cuda").tril())
        assert attention_of(lambda: real_2b(tree, embed_at=read)) == {"flash_attention", "efficient_attention"}
        decoder = Decoder(real_2b.backbone, 4, torch.bfloat16)
        decoder.make_room(300)
        inputs = torch.tensor([[5] * 4, [270] * 4, [200] * 4], device="cuda")
        assert attention_of(lambda: decoder.run(inputs, 512)) == set()  # two plain products: see attention_of_few_rows
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_decode_and_update_agree_in_bf16(real_2b):
    """The ratio of the first step is exactly 1. Decode loop and update pass have the same log-probabilities."""
    args = rl.Settings(G=4, slots=8, pass_tokens=1, max_new_tokens=64)
    rows = [pair.query for pair in random_pairs(2, real_2b)]
    prompts = [replace(row, ids=row.ids[: row.n_prompt], positions=row.positions[:, : row.n_prompt]) for row in rows]
    real_2b.share_vision(prompts, args.pass_tokens)
    rollouts = rl.rollout(real_2b, prompts, [0, 1], args)
    groups = [rl.Group(row, r, torch.tensor([1.0, -1.0, 0.5, -0.5], device="cuda"), True)
              for row, r in zip(prompts, rollouts)]  # fmt: skip
    figures = rl.update(real_2b, real_2b, groups, args)
    real_2b.zero_grad()
    assert figures["ratio"] == 1.0 and figures["kl"] == 0.0
    assert figures["logp_mismatch"] < 0.03


def count_syncs(run):
    """Host-device synchronisations of run()."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    return len(places), sorted(set(places))


def test_synchronisations(writer_dir, world):
    """At most 3 for a generated token (its inputs, its random numbers, what was sampled), 10 for a micro-batch."""
    model = on_gpu(writer_dir, bf16=True)
    rows = encoded(model, inputs()[:2], answered=False)
    found = {}
    for n in (20, 60):
        found[n], places = count_syncs(lambda n=n: generate_all(model, rows, script=[[[5] * n]] * 2, slots=2))
    assert (found[60] - found[20]) / 40 <= 4, places  # one more than without a script
    model.train()
    few, many = pairs_of(model, world), pairs_of(model, world)
    few, _ = count_syncs(lambda: sft.sft_step(model, few, sft.Settings(pass_tokens=10_000)))
    many, places = count_syncs(lambda: sft.sft_step(model, many, sft.Settings(pass_tokens=1)))
    assert (many - few) / 4 <= 10, places


def test_memory_of_training_passes(real_2b):
    """With fp32 weights (8.2 GiB): SFT of 64 pairs in passes of up to 32,768 tokens, an RL pass of 2 x 8 completions of
    2,048 tokens."""
    pairs = random_pairs(64, real_2b)
    real_2b.backbone.model.visual.merger.requires_grad_(True)
    assert peak_gib(lambda: sft.sft_step(real_2b, pairs, sft.Settings())) < 45
    real_2b.backbone.model.visual.merger.requires_grad_(False)
    row = text_prompt(real_2b, 1500)
    completions = [[7] * 2046 + [real_2b.gen_id, real_2b.end_id] for _ in range(8)]
    rollouts = rl.Rollouts(
        disc=torch.zeros(1536, device="cuda"), gen=torch.zeros(8, 1536, device="cuda"),
        valid=torch.ones(8, dtype=torch.bool), ids=completions, logp=[[0.0] * 2048] * 8, gen_at=[2046] * 8,
    )  # fmt: skip
    group = rl.Group(row, rollouts, torch.linspace(-1, 1, 8, device="cuda"), True)
    args = rl.Settings(pass_tokens=40_000)  # one pass
    assert peak_gib(lambda: rl.update(real_2b, real_2b, [group, group], args)) < 60
    real_2b.zero_grad(set_to_none=True)


def test_memory_of_a_long_rollout(real_2b):
    """64 completions of 1,024 tokens: the allocator holds at most half as much again as is used, and no leak."""
    rows = [text_prompt(real_2b, 600 + 30 * k) for k in range(8)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    done = generate_all(real_2b, rows, script=[[[7] * (1024 - 16 * g) for g in range(8)]] * 8, G=8, slots=64)
    assert len(done) == 8
    assert torch.cuda.max_memory_reserved() < 1.5 * torch.cuda.max_memory_allocated()
    held = []
    for _ in range(6):
        generate_all(real_2b, rows[:1], script=[[[7] * 300] * 8], G=8, slots=64)
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[-1][0] <= held[1][0] and held[-1][1] <= 1.05 * held[1][1]


def test_nccl_with_one_process(writer_dir, world, monkeypatch):
    """The collectives, a DDP step and a sharded model that decodes, on nccl: the same texts and gradients as alone."""
    alone = on_gpu(writer_dir)
    want = alone.embed(inputs(), max_new_tokens=16)
    sft.sft_step(alone.train(), pairs_of(alone, world), sft.Settings(pass_tokens=300, bf16=False))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    start_processes()
    dist.init_process_group("cpu:gloo,cuda:nccl")
    try:
        assert gather(torch.ones(2, device="cuda")).tolist() == [1, 1] and float(all_sum(torch.ones(()))) == 1
        args = sft.Settings(pass_tokens=300, bf16=False, checkpointing=False)
        ddp = torch.nn.parallel.DistributedDataParallel(on_gpu(writer_dir).train(), device_ids=[0])
        sft.sft_step(ddp, pairs_of(alone, world), args)
        for (name, a), (_, b) in zip(ddp.module.named_parameters(), alone.named_parameters()):
            assert b.grad is None or relative(a.grad, b.grad) < 1e-3 or b.grad.norm() < 1e-6, name
        sharded = Embedder.from_pretrained(writer_dir)
        distribute(sharded, sft.Settings(fsdp=True, bf16=False, checkpointing=False), torch.device("cuda"))
        with unsharded(sharded):
            got = sharded.embed(inputs(), max_new_tokens=16)
        assert got.texts == want.texts
    finally:
        end_processes()


def test_scripts_resume_on_a_gpu(writer_dir, world, tmp_path):
    """sft.py resumed after step 2 of 4 ends in the same weights up to rounding. Then two steps of rl.py."""

    def start(script, out, *more):
        command = [sys.executable, ROOT / script, "--media_root", world, "--out", out, "--workers", "2", *more]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    flags = ["--data", world / "sft.json", "--model", writer_dir, "--batch_size", 6, "--pass_tokens", 450,
             "--steps", 4, "--save_every", 2, "--lr", "1e-3"]  # fmt: skip
    assert "on cuda" in start("sft.py", tmp_path / "whole", *flags)
    (tmp_path / "cut/checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "whole/checkpoints/step-2", tmp_path / "cut/checkpoints/step-2")
    start("sft.py", tmp_path / "cut", *flags)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    before = load_file(writer_dir / "model.safetensors")
    assert [line["step"] for line in read_log(tmp_path / "cut")] == [3, 4]
    for name in a:
        moved = (a[name] - before[name]).norm() if name in before and before[name].shape == a[name].shape else 1.0
        assert (a[name] - b[name]).norm() <= 0.02 * moved + 1e-6, name
    start("rl.py", tmp_path / "rl", "--data", world / "rl.json", "--model", tmp_path / "whole", "--batch_size", 4,
          "--steps", 2, "--G", 3, "--slots", 12, "--max_new_tokens", 20)  # fmt: skip
    assert (tmp_path / "rl/model.safetensors").exists()
