"""`bench.py memory`: the memory plan of the real sizes. Other benches use its random models and rows of these sizes."""

import numpy as np
import torch
import torch.distributed as dist
import transformers
from bench_common import ROOT

import rl
import sft
from data import Pair, Row, mrope_positions
from model import Batch, Embedder
from support.backbones import FAMILIES, family_of
from support.distributed import shard

GIB = 2**30
GPUS = 8
ROW = {"sft": (4096, 2730), "rl": (1500 + 8 * 2048, 1500)}  # tokens of a row, of its prompt; rl: G = 8 completions


def size_of(hidden, intermediate, heads, kv_heads, vocab_size=151_936, tie=True, **more):
    return dict(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
                num_key_value_heads=kv_heads, vocab_size=vocab_size, tie=tie, **more)  # fmt: skip


# config.json of Qwen's models on the hub (public values, written down: there is no hub here)
SIZES = {"2b": size_of(1536, 8960, 12, 2), "7b": size_of(3584, 18_944, 28, 4, 152_064, False)}
WINDOWS = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, tokens_per_second=2)
DEEPSTACK = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, deepstack_visual_indexes=[5, 11, 17])
LARGE_DEEPSTACK = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16,
                       deepstack_visual_indexes=[8, 16, 24])  # fmt: skip
DEEP = dict(head_dim=128, num_hidden_layers=36)
FAMILY_SIZES = {
    "qwen2_vl": SIZES,
    "qwen2_5_vl": {"3b": size_of(2048, 11_008, 16, 2, num_hidden_layers=36, vision=WINDOWS),
                   "7b": SIZES["7b"] | dict(vision=WINDOWS)},
    "qwen3_vl": {"2b": size_of(2048, 6144, 16, 8, head_dim=128, vision=DEEPSTACK),
                 "4b": size_of(2560, 9728, 32, 8, vision=DEEPSTACK, **DEEP),
                 "8b": size_of(4096, 12_288, 32, 8, tie=False, vision=LARGE_DEEPSTACK, **DEEP)},
}  # fmt: skip


def random_model(hidden_size, tie, family="qwen2_vl", vision=None, depth=32, embed_dim=1280, num_hidden_layers=28,
                 heads=16, **text):  # fmt: skip
    """Return a model of transformers' class with random weights. vision: configuration of another family's tower."""
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


def mergers_of(model):
    return family_of(model.config).mergers(model.model.visual)


def toy_tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "assets/toy_base")
    tokenizer.add_tokens([token for token in ("<gen_emb>", "<disc_emb>") if token not in tokenizer.get_vocab()])
    return tokenizer


def random_pairs(n, model, seed=0):
    """Return n pairs: queries of 300 to 700 tokens with an image of 240, targets of 100 to 400, a third each an answer.

    All share one image's pixels, which are in CPU memory anyway.
    """
    rng = np.random.default_rng(seed)
    pixels, grid = rng.integers(0, 256, (960, 1176), np.uint8), np.array([[1, 24, 40]])

    def row(length, image):
        ids = rng.integers(10, 300, length)
        ids[np.isin(ids, [*model.media_ids, model.gen_id, model.disc_id])] = 9
        n_prompt = 2 * length // 3
        if image:
            n_prompt = max(n_prompt + 40, 260)  # <disc_emb> after the image
            ids[5:245] = model.media_ids[0]
        ids[n_prompt - 10], ids[length - 2] = model.disc_id, model.gen_id
        grids = grid if image else np.zeros((0, 3), int)
        return Row(ids, mrope_positions(ids, grids, model.media_ids), n_prompt, n_prompt - 10, length - 2,
                   pixels if image else np.zeros((0, 1176), np.uint8), grids, "random")  # fmt: skip

    return [Pair(row(int(rng.integers(300, 700)), True), row(int(rng.integers(100, 400)), False), k, True, "", "random",
                 "random")
            for k in range(n)]  # fmt: skip


def one_pass(embedder, stage, pass_tokens):
    """Run forward and backward of a pass of pass_tokens: sft.py's third pass, or prompts and their G completions (tree
    mask)."""
    L, prompt = ROW[stage]
    n = max(1, pass_tokens // L)  # rows
    config = embedder.backbone.config.vision_config
    # (1 + K) D_vit, the width of the states between the vision tower and its mergers
    width = len(mergers_of(embedder.backbone)) * getattr(config, "embed_dim", config.hidden_size)
    predict = (L * torch.arange(n)[:, None] + torch.arange(prompt, L - 1)).flatten()
    batch = Batch(
        ids=torch.zeros(n, L, dtype=torch.long),
        positions=torch.zeros(3, n, L, dtype=torch.long),
        media_at=torch.arange(n * 2 * prompt // embedder.family.merge**2),
        patches=torch.zeros(0, embedder.family.patch_values, dtype=torch.uint8),
        grids=np.zeros((0, 3), int),
        vision_states=torch.zeros(n * 2 * prompt, width, dtype=torch.bfloat16),
        mask=torch.ones(n, 1, L, L, dtype=torch.bool) if stage == "rl" else None,
    )
    read = torch.arange(L // 2, n * L, L // 2) if stage == "sft" else None
    out = embedder(batch, embed_at=read, predict=predict, labels=torch.zeros_like(predict))
    loss = -out.logp.mean()
    if stage == "sft":
        loss = loss + out.embeddings.sum()
    loss.backward()


def measured(values, stage, fsdp, pass_tokens):
    """Return the peak GiB of a forward and backward pass on fake tensors of the real size, above what lasts.

    fsdp: sharded over a simulated group of 8 ranks; otherwise a complete fp32 model under bf16 autocast.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore
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
            for _ in range(2):  # the second starts with gradients, as between micro-batches
                tracker.reset_mod_stats()
                one_pass(embedder, stage, pass_tokens)
    dist.destroy_process_group()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    peak = {str(getattr(key, "value", key)): value / GIB for key, value in peak.items()}
    lasting = ("Parameter", "Buffer", "Gradient", "Optstate", "Sharded Param", "Sharded Grad", "OptState", "Total")
    return sum(value for key, value in peak.items() if key not in lasting)


def linear_weights(module, embedding):
    """Count the weights of the linear layers, without the head that is tied to the token embedding."""
    linear = [m for m in module.modules() if isinstance(m, torch.nn.Linear) and m.weight is not embedding]
    return sum(m.weight.numel() for m in linear)


def gib_of(values, stage, fsdp, pass_tokens):
    """Return a row of the plan: {part: GiB per GPU}."""
    with torch.device("meta"):
        model = random_model(**values)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    total, visual, merger = count(model), count(model.model.visual), sum(map(count, mergers_of(model)))
    embedding = model.get_input_embeddings().weight
    n, is_rl = GPUS if fsdp else 1, stage == "rl"
    trained = total - visual + (0 if is_rl else merger)
    # the reference is only multiplied with: bf16 if its weights are complete; FSDP shards are fp32 and cast by FSDP
    reference = 4 * total / n if fsdp else 4 * total - 2 * linear_weights(model, embedding)
    decoder = 2 * (linear_weights(model.model.language_model, embedding) + embedding.numel())
    parts = {
        "weights": 4 * total / n,
        "gradients": 4 * trained / n,
        "AdamW": 8 * trained / n,
        "reference": is_rl * reference,
        "a pass": measured(values, stage, fsdp, pass_tokens) * GIB,
    }
    text = model.config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_values = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim  # of a token, in bf16
    rollouts = {
        "KV cache": is_rl * 64 * (1500 + 2048) * kv_values * 2,
        "decoder": is_rl * decoder * (1 if fsdp else 2),  # bf16 weights and, in a prefill, those of autocast
        "bf16 model": is_rl * fsdp * 2 * total,
    }
    # a pass and the rollouts are not at one time, and rollouts have no gradients
    least = min(parts["a pass"] + parts["gradients"], sum(rollouts.values()))
    parts |= rollouts
    parts["largest sum"] = sum(parts.values()) - least
    return {name: size / GIB for name, size in parts.items()}


def memory(args, _run):
    """Print the memory plan: what lasts from the parameter counts, what a pass needs from fake tensors."""
    head = True
    for size, values in list(FAMILY_SIZES[args.family].items())[: 1 if args.tiny else None]:
        values = values | dict(family=args.family) | (dict(num_hidden_layers=4, depth=1) if args.tiny else {})
        for stage, fsdp in (("sft", False), ("sft", True), ("rl", False), ("rl", True)):
            script = {"sft": sft, "rl": rl}[stage]
            preset = script.PRESETS["7b" if size in ("7b", "8b") else "2b"]
            pass_tokens = script.Settings(**preset).pass_tokens
            parts = gib_of(values, stage, fsdp, 4096 if args.tiny else pass_tokens)
            if head:
                print(f"| {args.family}, GiB per GPU | {' | '.join(parts)} |\n|{'---|' * (len(parts) + 1)}")
                head = False
            cells = " | ".join(f"{gib:.1f}" for gib in parts.values())
            print(f"| {size} {stage}{' --fsdp' * fsdp} | {cells} |", flush=True)
    print(f"\n{GPUS} GPUs. --pass_tokens of the preset 2b; 7b and 8b: of 7b. A row of rl: {ROW['rl'][0]:,} tokens")
