"""`bench.py memory` and `bench.py sft`: memory plan of the real sizes, and our SFT step against the official recipe."""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_peak import in_fresh_process, peak_above

ROOT = Path(__file__).resolve().parent.parent.parent
GIB = 2**30
GPUS, GPU_GIB = 8, 80e9 / GIB  # a GPU of 80 GB
PAGE = 12_040  # patches of a page of 2.4 M pixels, the largest picture
# of a forward pass and, of these, the prompt: both sides of --micro_batch pairs; a prompt and its G = 8 completions
TOKENS = {"sft": (4096, 2730), "rl": (1500 + 8 * 2048, 1500)}
# config.json of Qwen's models on the hub (public values, written down: there is no hub here)
SIZES = {
    "2b": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2,
               vocab_size=151_936, tie=True),
    "7b": dict(hidden_size=3584, intermediate_size=18_944, num_attention_heads=28, num_key_value_heads=4,
               vocab_size=152_064, tie=False),
}  # fmt: skip
WINDOWS = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, tokens_per_second=2)
DEEPSTACK = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, deepstack_visual_indexes=[5, 11, 17])
LARGE_DEEPSTACK = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16,
                       deepstack_visual_indexes=[8, 16, 24])  # fmt: skip
FAMILY_SIZES = {
    "qwen2_vl": SIZES,
    "qwen2_5_vl": {
        "3b": dict(hidden_size=2048, intermediate_size=11_008, num_attention_heads=16, num_key_value_heads=2,
                   num_hidden_layers=36, vocab_size=151_936, tie=True, vision=WINDOWS),
        "7b": SIZES["7b"] | dict(vision=WINDOWS),
    },
    "qwen3_vl": {
        "2b": dict(hidden_size=2048, intermediate_size=6144, num_attention_heads=16, num_key_value_heads=8,
                   head_dim=128, vocab_size=151_936, tie=True, vision=DEEPSTACK),
        "4b": dict(hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8,
                   head_dim=128, num_hidden_layers=36, vocab_size=151_936, tie=True, vision=DEEPSTACK),
        "8b": dict(hidden_size=4096, intermediate_size=12_288, num_attention_heads=32, num_key_value_heads=8,
                   head_dim=128, num_hidden_layers=36, vocab_size=151_936, tie=False, vision=LARGE_DEEPSTACK),
    },
}  # fmt: skip


def random_model(hidden_size, tie, family="qwen2_vl", vision=None, depth=32, embed_dim=1280, num_hidden_layers=28,
                 heads=16, **text):  # fmt: skip
    """A model of transformers' class with random weights, on whatever device is the default. vision: configuration of
    another family's tower."""
    import transformers

    from support.backbones import FAMILIES

    model_class = getattr(transformers, FAMILIES[family].model_class)
    dim = text.get("head_dim") or hidden_size // text["num_attention_heads"]  # 128 in the real ones: 16, 24, 24
    rope = {"rope_type": "default", "mrope_section": [dim // 8, dim * 3 // 16, dim * 3 // 16], "rope_theta": 1e6}
    vision = vision and dict(vision, out_hidden_size=hidden_size)
    config = model_class.config_class(
        text_config=dict(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, rope_parameters=rope,
                         max_position_embeddings=32_768, rms_norm_eps=1e-6, **text),
        vision_config=vision or dict(depth=depth, embed_dim=embed_dim, num_heads=heads, hidden_size=hidden_size),
        tie_word_embeddings=tie, attn_implementation="sdpa",
    )  # fmt: skip
    return model_class(config)


def vision_width(model):
    """(1 + K) D_vit: of the states that wait between the vision tower and its mergers."""
    config = model.config.vision_config
    return len(mergers_of(model)) * getattr(config, "embed_dim", config.hidden_size)


def mergers_of(model):
    from support.backbones import family_of

    return family_of(model.config).mergers(model.model.visual)


def toy_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/toy_base")
    tokenizer.add_tokens([token for token in ("<gen_emb>", "<disc_emb>") if token not in tokenizer.get_vocab()])
    return tokenizer


# ---- memory ----------------------------------------------------------------------------------------------------


def one_pass(embedder, stage):
    """Forward and backward of one row: sft.py's third pass, or a prompt and its G completions under the tree mask."""
    from model import Batch

    L, prompt = TOKENS[stage]
    read, predict = torch.tensor([L // 2, L - 2]), torch.arange(prompt, L - 1)
    batch = Batch(
        ids=torch.zeros(1, L, dtype=torch.long),
        positions=torch.zeros(3, 1, L, dtype=torch.long),
        media_at=torch.arange(2 * prompt // embedder.family.merge**2),
        patches=torch.zeros(0, embedder.family.patch_values, dtype=torch.uint8),
        grids=np.zeros((0, 3), int),
        vision_states=torch.zeros(2 * prompt, vision_width(embedder.backbone), dtype=torch.bfloat16),
        mask=torch.ones(1, 1, L, L, dtype=torch.bool) if stage == "rl" else None,
    )
    embeddings, logp, *_ = embedder(batch, embed_at=read, predict=predict, labels=torch.zeros_like(predict))
    (embeddings.sum() - logp.mean()).backward()


def measured(values, stage, fsdp):
    """Peak GiB of a forward and backward pass on fake tensors of the real size, above what lasts. values: of
    FAMILY_SIZES.

    fsdp: sharded by model.shard over a pretended group of 8 processes; else a replica of fp32 under bf16 autocast.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from model import Embedder
    from support.distributed import shard

    dist.init_process_group("fake", rank=0, world_size=GPUS, store=FakeStore())
    mesh = init_device_mesh("cpu", (GPUS,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        embedder = Embedder(random_model(**values), toy_tokenizer())
        embedder.bf16 = True
        embedder.backbone.activation_checkpointing_enable({"use_reentrant": False})
        embedder.train()
        if fsdp:
            shard(embedder, True, mesh)
        tracker = FSDPMemTracker(embedder) if fsdp else MemTracker()
        tracker.track_inputs(()) if fsdp else tracker.track_external(embedder)
        with tracker:
            for _ in range(2):  # in the second one the gradients are there from the start, as between micro-batches
                tracker.reset_mod_stats()
                one_pass(embedder, stage)
    dist.destroy_process_group()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    peak = {str(getattr(key, "value", key)): value / GIB for key, value in peak.items()}
    lasting = ("Parameter", "Buffer", "Gradient", "Optstate", "Sharded Param", "Sharded Grad", "OptState", "Total")
    return sum(value for key, value in peak.items() if key not in lasting)


def linear_weights(module, embedding):
    """Numbers in the weights of the linear layers, without the head that is tied to the token embedding."""
    linear = [m for m in module.modules() if isinstance(m, torch.nn.Linear) and m.weight is not embedding]
    return sum(m.weight.numel() for m in linear)


def column(values, stage, fsdp):
    """One column of the plan, bytes a GPU -> ({what lasts}, {of the pass}, {of the rollouts}, {parts of others})."""
    with torch.device("meta"):
        model = random_model(**values)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    whole, visual, merger = count(model), count(model.model.visual), sum(map(count, mergers_of(model)))
    embedding = model.get_input_embeddings().weight
    n, rl, L = GPUS if fsdp else 1, stage == "rl", TOKENS[stage][0]
    trained = whole - visual + (0 if rl else merger)
    # the reference is only multiplied with: bf16 where the weights are whole, fp32 shards where FSDP casts them itself
    reference = 4 * whole / n if fsdp else 4 * whole - 2 * linear_weights(model, embedding)
    lasting = {
        "parameters (fp32)": 4 * whole / n,
        "gradients (fp32)": 4 * trained / n,
        "AdamW's moments": 8 * trained / n,
        "AdamW's temporaries (fused)": 0,
        "reference (linear weights bf16; sharded: fp32)": rl * reference,
    }
    in_pass = {"a pass": measured(values, stage, fsdp) * GIB}
    decoder = 2 * (linear_weights(model.model.language_model, embedding) + embedding.numel())
    rollouts = {
        "rollouts: 64 x 3,548 keys and values": rl * 64 * (1500 + 2048) * kv_bytes(model),
        "rollouts: bf16 weights of the decoder and, in a prefill, of autocast": rl * decoder * (1 if fsdp else 2),
        "rollouts: the model put together in bf16": rl * fsdp * 2 * whole,
    }
    parts = {
        "in the pass: tree mask (bool, SDPA's bf16 copy)": rl * 3 * L * L,
        "not needed: temporaries of foreach AdamW": 4 * trained / n,  # its square root of the second moments
    }
    return lasting, in_pass, rollouts, parts


def kv_bytes(model):
    """Of a token's keys and values, in bf16."""
    text = model.config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * 2


def size_line(size, values):
    with torch.device("meta"):
        model = random_model(**values)
    whole, vision = (sum(p.numel() for p in module.parameters()) for module in (model, model.model.visual))
    return (f"{size}: {whole / 1e9:.4f} B parameters, {vision / 1e9:.4f} B of them vision; keys and values of a token: "
            f"{kv_bytes(model):,} bytes")  # fmt: skip


def memory(family="qwen2_vl", tiny=False):
    """The memory plan, GiB a GPU: what lasts from the parameter counts, what a pass needs from fake tensors."""
    sizes = {size: values | dict(family=family) for size, values in FAMILY_SIZES[family].items()}
    if tiny:
        size, values = next(iter(sizes.items()))
        sizes = {size: values | dict(num_hidden_layers=4, depth=1)}
    columns = {}
    for size, values in sizes.items():
        for stage, fsdp in (("sft", False), ("sft", True), ("rl", False), ("rl", True)):
            lasting, in_pass, rollouts, parts = column(values, stage, fsdp)
            # a pass and the rollouts are not at one time, and while these are made there are no gradients
            least = min(sum(in_pass.values()) + lasting["gradients (fp32)"], sum(rollouts.values()))
            everything = lasting | in_pass | rollouts
            everything["**largest sum at one time**"] = sum(everything.values()) - least
            columns[f"{size} {stage}{' --fsdp' * fsdp}"] = everything | parts
            print(f"{size} {stage} fsdp={fsdp}: done", file=sys.stderr, flush=True)
    lines = [size_line(size, values) for size, values in sizes.items()]
    lines += ["", f"| GiB a GPU, {GPUS} GPUs | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for key in next(iter(columns.values())):
        lines.append(f"| {key} | {' | '.join(f'{column[key] / GIB:.1f}' for column in columns.values())} |")
    fits = [column["**largest sum at one time**"] / GIB < 0.95 * GPU_GIB for column in columns.values()]
    cells = ["yes" if x else "no" for x in fits]
    lines.append(f"| fits 80 GB ({GPU_GIB:.1f} GiB, 5 % left free) | {' | '.join(cells)} |")
    tokens = ", ".join(f"{stage} {n:,}" for stage, (n, _) in TOKENS.items())
    lines.append(f"\nTokens of a pass: {tokens}. The last rows before the verdict are in no sum.")
    print("\n".join([*lines, "", *vision_lines(sizes)]))


def vision_lines(sizes):
    """The vision states of a step, which wait in the CPU's memory: bf16, a full page on both sides of every pair."""
    pages = {}  # bytes
    for size, values in sizes.items():
        with torch.device("meta"):
            model = random_model(**values)
        width = vision_width(model)
        merged = len(mergers_of(model)) * values["hidden_size"]
        pages[f"sft {size}: before the merger, {width:,} wide"] = PAGE * width * 2
        pages[f"rl {size}: merged, {merged:,} wide"] = PAGE // 4 * merged * 2
    lines = ["| vision states in the CPU's memory, GiB a process | a page | 64 pairs | 128 pairs |"]
    lines.append("|---|---|---|---|")
    for name, page in pages.items():
        lines.append(f"| {name} | {page / GIB:.3f} | {2 * 64 * page / GIB:.1f} | {2 * 128 * page / GIB:.1f} |")
    return lines


# ---- the SFT step against the official recipe ------------------------------------------------------------------

# reference/perf.md's model: 8 layers of 512, ViT of 4 x 320; a vocabulary of 10,240 gives head and layers the ratio of
# the real 2B, one of 151,936 the real logits
SMALL = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=2,
             num_hidden_layers=8, depth=4, embed_dim=320, heads=4, tie=True)  # fmt: skip
TINY = SMALL | dict(hidden_size=128, intermediate_size=512, num_attention_heads=2, num_key_value_heads=1,
                    num_hidden_layers=2, depth=1, embed_dim=80, heads=1)  # fmt: skip


def random_pairs(n, model, seed=0):
    """Pairs with a picture of 240 tokens in the query: queries of 300 to 700 tokens, targets of 100 to 400, about a
    third of each an answer. All share one picture's pixels: on a GPU they would not be in its memory either."""
    from data import Pair, Row, mrope_positions

    rng = np.random.default_rng(seed)
    pixels, grid = rng.integers(0, 256, (960, 1176), np.uint8), np.array([[1, 24, 40]])

    def row(length, picture):
        ids = rng.integers(10, 300, length)
        ids[np.isin(ids, [*model.media_ids, model.gen_id, model.disc_id])] = 9
        n_prompt = 2 * length // 3
        if picture:
            n_prompt = max(n_prompt + 40, 260)  # <disc_emb> stands after the picture, not in it
            ids[5:245] = model.media_ids[0]
        ids[n_prompt - 10], ids[length - 2] = model.disc_id, model.gen_id
        grids = grid if picture else np.zeros((0, 3), int)
        return Row(ids, mrope_positions(ids, grids, model.media_ids), n_prompt, n_prompt - 10, length - 2,
                   pixels if picture else np.zeros((0, 1176), np.uint8), grids, "random")  # fmt: skip

    return [Pair(row(int(rng.integers(300, 700)), True), row(int(rng.integers(100, 400)), False), k, True, "", "random")
            for k in range(n)]  # fmt: skip


def official_step(model, pairs):
    """Two forward passes of transformers with the logits of all tokens in fp32, both graphs alive, one backward."""
    from conftest import processor_inputs

    from sft import info_nce

    sides, loss = [], 0.0
    for rows in ([p.query for p in pairs], [p.target for p in pairs]):
        batch, _ = processor_inputs(model, rows)
        out = model.backbone(**batch, output_hidden_states=True, use_cache=False)
        labels = batch["input_ids"].clone()
        for b, row in enumerate(rows):
            labels[b, : row.n_prompt] = labels[b, len(row.ids) :] = -100
        logits = out.logits.float()[:, :-1].contiguous()
        loss = loss + F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        at = torch.tensor([[row.disc_at, row.gen_at] for row in rows])
        sides.append(F.normalize(out.hidden_states[-1][torch.arange(len(rows))[:, None], at].float(), dim=-1))
    loss = loss + sum(info_nce(sides[0][:, k], sides[1][:, k]) for k in (0, 1))
    loss.backward()
    return float(loss)


def step_alone(who, n, vocabulary, micro_batch, repeats, tiny):
    """In a process of its own: peak memory above the loaded model (MiB; the rows are in it), CPU seconds of the best of
    `repeats` steps, loss."""
    from model import Embedder
    from sft import Settings, sft_step

    torch.manual_seed(0)
    model = Embedder(random_model(vocab_size=vocabulary, **(TINY if tiny else SMALL)), toy_tokenizer()).train()
    model.backbone.model.visual.requires_grad_(False)
    model.backbone.model.visual.merger.requires_grad_(True)
    model.backbone.config.image_token_id, model.backbone.config.video_token_id = model.media_ids
    seconds = []

    def steps():
        for _ in range(repeats):
            pairs = random_pairs(n, model)
            began = time.process_time()
            if who == "official":
                loss = official_step(model, pairs)
            else:
                parts, _ = sft_step(model, pairs, Settings(micro_batch=micro_batch))
                loss = parts["loss"]
            seconds.append(time.process_time() - began)
            model.zero_grad()
        return loss

    peak, loss = peak_above(steps)
    return {"who": who, "pairs": n, "peak": peak, "seconds": min(seconds), "loss": loss}


def sft_table(tiny=False):
    """Ratios of one run; memory with the real vocabulary and by batch, time with the small one."""
    real, small_v = (10_240, 2048) if tiny else (151_936, 10_240)  # vocabularies
    three, six, eight, many = (2, 2, 2, 4) if tiny else (3, 6, 8, 64)  # pairs

    def alone(*given):
        found = in_fresh_process("bench_scale", f"step_alone{(*given, tiny)!r}", tiny)
        print(given, found, file=sys.stderr, flush=True)
        return found

    official, ours = alone("official", three, real, 0, 1), alone("ours", three, real, 1, 1)
    small, large = alone("ours", eight, small_v, 4, 1), alone("ours", many, small_v, 4, 1)
    slow, fast = [], []
    for _ in range(1 if tiny else 2):  # taken in turns
        slow.append(alone("official", six, small_v, 0, 2)["seconds"])
        fast.append(alone("ours", six, small_v, 1, 2)["seconds"])
    print("| SFT step | official recipe | ours | ratio |\n|---|---|---|---|")
    label = f"peak memory above the model, {three} pairs, V = {real:,}, MiB"
    print(f"| {label} | {official['peak']:.0f} | {ours['peak']:.0f} | {ours['peak'] / official['peak']:.2f} |")
    print(f"| CPU seconds a pair, {six} pairs, V = {small_v:,} | {min(slow) / six:.2f} | {min(fast) / six:.2f} | "
          f"{min(fast) / min(slow):.2f} |")  # fmt: skip
    print(f"\n| ours, --micro_batch 4 | {eight} pairs | {many} pairs | ratio |\n|---|---|---|---|")
    print(f"| peak memory above the model, MiB | {small['peak']:.0f} | {large['peak']:.0f} | "
          f"{large['peak'] / small['peak']:.2f} |")  # fmt: skip
    print(f"\nloss of the {three} pairs: official {official['loss']:.5f}, ours {ours['loss']:.5f}")
