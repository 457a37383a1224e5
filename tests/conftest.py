"""Shared by the tests: tiny random models with a toy tokenizer, a dataset, and transformers' own forward pass."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/bench")]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

# ruff: noqa: E402 (the path is set above)
import data
import eval as ev
import support.settings as settings_file
from data import encode_input
from model import Embedder, Prompt
from support.backbones import FAMILIES
from support.formats import DISC, INSTRUCTION
from support.head import sampling_logits
from support.images import normalise

CLOSE = dict(rtol=0, atol=1e-5)
TAIL = f"\n{DISC}\n{INSTRUCTION}"
RL_ROW = {f"{s}_{k}": v for s in ("qry", "pos") for k, v in (("text", "t"), ("image", ""), ("video", [""]))}


def pytest_configure():
    """A shell starts a job in the background with SIGINT ignored, which the processes of the tests would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def picture(seed=0, width=70, height=56, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


# model type -> text_config, vision_config of a small random one. Sections of the rotary positions: half a head's width.
# Qwen2.5-VL: a layer with windows of 2 x 2 tokens and one without, time that counts by 4, an untied head. Qwen3-VL: two
# layers of DeepStack.
TEXT = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=4096, initializer_range=0.1)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
VISION = dict(num_heads=2, initializer_range=0.05)
MODELS = {
    "qwen2_vl": (dict(TEXT, rope_parameters={**ROPE, "mrope_section": [4, 6, 6]}),
                 dict(VISION, depth=1, embed_dim=32, hidden_size=128)),
    "qwen2_5_vl": (dict(TEXT, rope_parameters={**ROPE, "mrope_section": [4, 6, 6]}),
                   dict(VISION, depth=2, hidden_size=32, intermediate_size=48, out_hidden_size=128, window_size=56,
                        fullatt_block_indexes=[1])),
    "qwen3_vl": (dict(TEXT, head_dim=48, rope_parameters={**ROPE, "mrope_section": [8, 8, 8]}),
                 dict(VISION, depth=4, hidden_size=32, intermediate_size=48, out_hidden_size=128,
                      num_position_embeddings=16, deepstack_visual_indexes=[0, 2])),
}  # fmt: skip


def random_backbone(model_type, vocabulary=300, tokens=None, **ids):
    """Norms and biases random too: ones and zeros would hide a pass that leaves them out."""
    text, vision = MODELS[model_type]
    text = dict(text, vocab_size=vocabulary, bos_token_id=None, **(tokens or {}))
    torch.manual_seed(0)
    model_class = getattr(transformers, FAMILIES[model_type].model_class)
    config = model_class.config_class(
        text_config=text, vision_config=vision, tie_word_embeddings=model_type != "qwen2_5_vl", **ids
    )
    backbone = model_class(config).eval()
    with torch.no_grad():
        for p in backbone.parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn_like(p)
    return backbone


def save_random_model(path, model_type):
    """A folder of a small random model with the toy's tokenizer, without the two embedding tokens."""
    from toy_base import SPECIAL, toy_tokenizer

    tokenizer = toy_tokenizer()
    id_of = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    ids = {f"{name}_token_id": id_of[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    ids |= {f"{name}_token_id": id_of[f"<|{name}_pad|>"] for name in ("image", "video")}
    tokens = dict(eos_token_id=id_of["<|im_end|>"], pad_token_id=id_of["<|endoftext|>"])
    random_backbone(model_type, len(tokenizer) + 2, tokens, **ids).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A random Qwen2-VL folder (the toy architecture) without the two embedding tokens."""
    from toy_base import toy_model

    path = tmp_path_factory.mktemp("tiny")
    toy_model(path, seed=1)
    return path


@pytest.fixture(scope="session")
def embedder(tiny_dir):
    return Embedder.from_pretrained(tiny_dir)


def inputs():
    """One input of every kind: text, an image, two images, a video with an odd number of frames, image and video."""
    return [
        {"text": "a red star"},
        {"text": "what is it?", "images": [picture(0)]},
        {"text": "two", "images": [picture(1), picture(2, 90, 30)]},
        {"text": "moving", "video": [picture(i, 84, 84) for i in range(3)]},
        {"text": "all of it", "images": [picture(3, 30, 30)], "video": [picture(i, 60, 90) for i in range(4)]},
    ]


ANSWERS = ["<think>a red star</think><answer>red star<gen_emb>", "<think>so, a ring</think><answer>blue ring<gen_emb>"]


@pytest.fixture(scope="session")
def writer_dir(tiny_dir, tmp_path_factory):
    return train_writer(tmp_path_factory.mktemp("writer"), tiny_dir)


def train_writer(path, tiny_dir, steps=12):
    """A tiny model after a short training on ANSWERS: most of its samples have a <gen_emb>, in different places."""
    model = Embedder.from_pretrained(tiny_dir)
    items = [{"text": "what"}, inputs()[1], inputs()[3], {"text": "a longer question"}]
    rows = encoded(model, items)
    batch = model.pad_rows(rows)
    at = answer_places(rows, batch.ids.shape[1])
    labels = batch.ids.flatten()[at + 1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        (-model(batch, predict=at, labels=labels).logp.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def writer(writer_dir):
    return Embedder.from_pretrained(writer_dir)


def encoded(model, items, answered=True):
    answers = [ANSWERS[n % 2] if answered else None for n in range(len(items))]
    return [encode_input(model.tokenizer, x, answer, blank_image=False, family=model.family)
            for x, answer in zip(items, answers)]  # fmt: skip


def answer_places(rows, L):
    """Flat places in [B, L] that predict the tokens behind the prompts."""
    return torch.tensor([b * L + t for b, r in enumerate(rows) for t in range(r.n_prompt - 1, len(r.ids) - 1)])


def generate_all(model, rows, seeds=None, script=None, **settings):
    """model.generate() for rows -> {n: Rollouts}; the seed of row n is n where none are given."""
    seeds = range(len(rows)) if seeds is None else seeds
    prompts = [Prompt(n, row, seeds[n]) for n, row in enumerate(rows)]
    with scripted(model, script, lambda prompt: prompt.key) if script else contextlib.nullcontext():
        return {prompt.key: r for prompt, r in model.generate(prompts, **settings)}


@contextlib.contextmanager
def scripted(model, script, number=lambda prompt: int(prompt.row.name.split()[-1])):
    """model.generate() writes script[n], G lists of token ids, for the prompt of row n (or named "input n")."""

    def append_tokens(completions, hidden, decoder, temperature):
        logits = sampling_logits(decoder.head(hidden.to(decoder.dtype)), model.banned, temperature or 1.0)
        scripts = [script[number(c.prompt)][c.g] for c in completions]
        tokens = [ids[len(c.ids)] if len(c.ids) < len(ids) else model.end_id for c, ids in zip(completions, scripts)]
        at = torch.tensor(tokens, device=logits.device)[:, None]
        logp = logits.log_softmax(-1).gather(-1, at)[:, 0].tolist()
        for completion, ids, token, log_p in zip(completions, scripts, tokens, logp):
            completion.limit = len(ids)
            completion.append(token, log_p, model.end_id)

    model.append_tokens = append_tokens
    try:
        yield
    finally:
        del model.append_tokens  # the method of the class is visible again


def processor_inputs(model, rows, left=False):
    """What transformers' processor would hand to the model for these rows, and where row b begins."""
    image_id, video_id = model.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    B, L = len(rows), max(len(row.ids) for row in rows)
    ids, mask = torch.full((B, L), model.tokenizer.pad_token_id), torch.zeros(B, L, dtype=torch.long)
    begin = [L - len(row.ids) if left else 0 for row in rows]
    media = {image_id: ([], []), video_id: ([], [])}  # patches, grids
    for b, row in enumerate(rows):
        ids[b, begin[b] : begin[b] + len(row.ids)] = torch.from_numpy(row.ids)
        mask[b, begin[b] : begin[b] + len(row.ids)] = 1
        pads, patch = [token for token in row.ids if token in media], 0
        for grid in row.grids:
            n = int(grid.prod())
            patches = torch.from_numpy(row.patches[patch : patch + n])
            kind = pads[patch // model.family.merge**2]
            media[kind][0].append(normalise(patches, model.family))
            media[kind][1].append(torch.from_numpy(grid))
            patch += n
    out = {"input_ids": ids, "attention_mask": mask}
    out["mm_token_type_ids"] = (ids == image_id).long() + 2 * (ids == video_id).long()
    for kind, (x, g) in (("image", media[image_id]), ("video", media[video_id])):
        if x:
            out |= {"pixel_values" + "_videos" * (kind == "video"): torch.cat(x), f"{kind}_grid_thw": torch.stack(g)}
    return out, begin


def transformers_forward(model, rows, left=False):
    """Return per row the last layer's states [L, D] and the logits [L, V] of transformers' own code, with gradients."""
    batch, begin = processor_inputs(model, rows, left)
    model.backbone.model.rope_deltas = None
    out = model.backbone(**batch, output_hidden_states=True, use_cache=False)
    cut = [slice(b, b + len(row.ids)) for b, row in zip(begin, rows)]
    return [(out.hidden_states[-1][b, c], out.logits[b, c]) for b, c in enumerate(cut)]


def with_answer(row, ids):
    """A prompt's Row continued by token ids (the positions are left to transformers)."""
    return replace(row, ids=np.concatenate([row.ids[: row.n_prompt], np.array(ids, dtype=row.ids.dtype)]))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want, rtol=1e-4):
    """Equal up to a share of each tensor's largest entry; a parameter without gradient equals one with zeros."""
    assert got, "no gradients"
    for name in got.keys() | want.keys():
        a, b = got.get(name), want.get(name)
        a, b = torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b
        scale = max(float(a.abs().max()), float(b.abs().max()), 1e-6)
        assert float((a - b).abs().max()) <= rtol * scale, (name, float((a - b).abs().max()), scale)


def turn_pair(human, answer, style=0):
    styles = (("from", "human", "gpt", "value"), ("role", "user", "assistant", "content"))
    who, user, assistant, text = styles[style]
    return [{who: user, text: human}, {who: assistant, text: answer}]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """12 SFT and 12 RL pairs of two datasets with every kind of side; pictures, the blank one is missing."""
    root = tmp_path_factory.mktemp("world")
    (root / "images").mkdir()
    for i in range(6):
        picture(i, 40 + 8 * i, 56).save(root / f"images/{i}.png")
    sft, rl = [], []
    for i in range(12):
        query = [
            {"image": f"images/{i % 6}.png", "conversations": turn_pair(f"<image>\nwhat is it{TAIL}", ANSWERS[0])},
            {"image": ["images/0.png", f"images/{i % 6}.png"],
             "conversations": turn_pair(f"<image><image>\nboth of {i}{TAIL}", ANSWERS[1], 1)},
            {"video": [f"images/{(i + k) % 6}.png" for k in range(3)],
             "conversations": turn_pair(f"<video>\nmoving{TAIL}", ANSWERS[0])},
        ][i % 3]  # fmt: skip
        words = f"thing {i // 2}"  # each target occurs twice
        target = [
            {"image": "images/blank.jpg", "conversations": turn_pair(f"<image>\n{words}{TAIL}", ANSWERS[1])},
            {"conversations": turn_pair(f"{words}{TAIL}", ANSWERS[0], 1)},
        ][i // 2 % 2]
        name = "one" if i < 6 else "two"
        sft.append({"dataset_name": name, "qry": query, "pos": target})
        rl.append({"dataset": "tiny", "dataset_name": name, "solution": "<embedding>", "qry_text": f"what {i}",
                   "qry_image": f"images/{i % 6}.png" if i % 3 else "",
                   "qry_video": [""] if i % 3 else ["images/1.png", "images/2.png"],
                   "pos_text": f" {words}\n", "pos_image": "", "pos_video": [""]})  # fmt: skip
    (root / "sft.json").write_text(json.dumps(sft))
    (root / "sft.jsonl").write_text("\n".join(json.dumps(row) for row in sft))
    (root / "rl.json").write_text(json.dumps(rl))
    return root


def with_a_missing_image(world):
    """Write the SFT rows of the world again, with a missing image in row 7, and return the file."""
    rows = json.loads((world / "sft.json").read_text())
    rows[7]["qry"] = rows[7]["qry"] | {"image": ["images/0.png", "images/gone.png"]}
    (world / "sft_gone.json").write_text(json.dumps(rows))
    return world / "sft_gone.json"


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """192 SFT and 96 RL pairs in the published formats with images of two emoji fonts (licences in its README)."""
    path = tmp_path_factory.mktemp("real")
    shutil.unpack_archive(ROOT / "tests/data/real_data.tar.gz", path)
    return path / "real_data"


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """The miniature root of MMEB-V2, for tests that only read it."""
    path = tmp_path_factory.mktemp("mini")
    shutil.unpack_archive(ROOT / "tests/data/mini_mmeb_root.tar.gz", path)
    return path / "mini_mmeb_root"


def run_here(module, argv, monkeypatch):
    """The script's main() in this process: no second import of torch, and the test may replace its parts."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    try:
        module.main()
    finally:
        settings_file.HELD.clear()  # a process keeps the locks of its folders until it ends, and this one goes on


def on_call(owner, name, n, action, patch=setattr):
    """Replace a function of a module or class: its n-th call is action(real, *arguments)."""
    calls, real = [], getattr(owner, name)

    def acting(*given, **more):
        calls.append(1)
        return action(real, *given, **more) if len(calls) == n else real(*given, **more)

    patch(owner, name, acting)


def run_processes(module, argv, processes=2, codes=0, before=lambda rank: None):
    """Run main() on several ranks, as forks, after before(rank). codes: the exit code of all ranks, or one each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                before(rank)
                sys.argv = [f"{module.__name__}.py", *map(str, argv)]
                module.main()
                os._exit(0)
            except SystemExit as end:
                print(end, file=sys.stderr, flush=True)
                os._exit(end.code if isinstance(end.code, int) else 1)
            except BaseException:  # noqa: BLE001 (the child must never come back into pytest)
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    got = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert got == (codes if isinstance(codes, list) else [codes] * processes)


def read_log(out):
    """The numbers of log.jsonl, without those of clock, memory and passes."""
    left_out = ("dataset", "padding", "pairs_per_s", "tokens_per_s", "data_wait_s", "rollout_s", "peak_memory_gib",
                "eta_s")  # fmt: skip
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in left_out} for line in lines]


def start(stage, argv, patch="", processes=1, script=True, until=60, **more):
    """Run a stage (script False: only main()) after the lines of patch. Return (exit codes, output, seconds)."""
    code = f"import sys, os, signal, time\nsys.argv = ['{stage}.py', *sys.argv[1:]]\nimport {stage} as s\n{patch}\n"
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # these tests may themselves run under nohup
    code += "from support.program import run_script\nrun_script(s.main)" if script else "s.main()"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more.pop("env", {})}
    if processes > 1:
        port = str(20_000 + os.getpid() % 20_000)
        env |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    began = time.time()
    children = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        children.append(subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], env=env | own, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more))  # fmt: skip
    output = "".join(child.communicate(timeout=until)[0] for child in children)
    return [child.returncode for child in children], output, time.time() - began


def start_script(world, script, processes, *argv):
    """Start a script in a process group of its own, under torchrun if there are several ranks."""
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *run, str(ROOT / script), *map(str, argv)], env=env, cwd=world,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip


def pids(marker):
    """The processes that have this text in their command line."""
    found = subprocess.run(["pgrep", "-f", str(marker)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def run_data(*argv):
    """Run a command of data.py in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            run_here(data, argv, patch)
        except SystemExit as stop:
            return stop.code
    return 0


def check_tasks(root, *tasks):
    """Return the exit code of eval.py --check."""
    with pytest.raises(SystemExit) as stop:
        ev.main(["--check", "--root", str(root), *(["--tasks", *tasks] if tasks else [])])
    return stop.value.code


def flags(tiny_dir, world, out, **more):
    """Return the command line of a short run of sft.py."""
    given = dict(model=tiny_dir, data=world / "sft.json", media_root=world, out=out, steps=2, batch_size=4,
                 pass_tokens=220, tau_steps=0, lr=1e-3, tau=0.1, workers=0, save_every=100, cache=world / "cache",
                 max_skipped=1) | more  # fmt: skip
    return [x for key, value in given.items() for x in (f"--{key}", value)]


def rl_flags(writer_dir, world, out, **more):
    """Return the command line of a short run of rl.py."""
    given = dict(model=writer_dir, data=world / "rl.json", media_root=world, out=out, steps=1, batch_size=4,
                 slots=9, pass_tokens=180, G=3, max_new_tokens=16, lr=1e-3, workers=0, save_every=100,
                 cache=world / "cache") | more  # fmt: skip
    return [x for key, value in given.items() for x in (f"--{key}", value)]


def act_at(module, function, call, action, ranks=(0, 1)):
    """Return before(rank) for run_processes. action() runs in the call-th call of the function of the module."""

    def acting(real, *given, **more):
        action()
        return real(*given, **more)

    return lambda rank: on_call(module, function, call, acting) if rank in ranks else None


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def die_softly(*_, **__):
    raise KeyboardInterrupt


def weights(out):
    return load_file(out / "model.safetensors")


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed_copy(source, path, change, file="model.safetensors"):
    """Copy a model folder. change(content) edits the tensors or one JSON file of the copy in place."""
    shutil.copytree(source, path, dirs_exist_ok=True)
    if file.endswith(".json"):
        content = json.loads((path / file).read_text())
        change(content)
        (path / file).write_text(json.dumps(content))
    else:
        tensors = load_file(path / file)
        change(tensors)
        save_file(tensors, path / file, {"format": "pt"})
    return path


class StepCache:
    """What transformers' attention calls in a decode step: write new keys and values, return the first K."""

    def __init__(self, slot_cache, index, K):
        self.slot_cache, self.index, self.K = slot_cache, index, K

    def update(self, k, v, layer, *_args, **_kwargs):
        kv, rows = self.slot_cache.kv[layer], torch.arange(len(k), device=k.device)
        kv[0][rows, :, self.index] = k[:, :, 0].to(kv.dtype)
        kv[1][rows, :, self.index] = v[:, :, 0].to(kv.dtype)
        return kv[:, : len(k), :, : self.K]


def transformers_read(backbone, bf16=False):
    """-> what can stand in the place of support.decode.Decoder.run."""

    def read(decoder, inputs, K):
        tokens, index, positions = inputs
        visible = torch.arange(K, device=index.device) <= index[:, None]
        with torch.autocast(index.device.type, torch.bfloat16, enabled=bf16):
            return backbone.model.language_model(
                inputs_embeds=backbone.get_input_embeddings()(tokens)[:, None], use_cache=True,
                position_ids=positions.expand(3, -1)[..., None], attention_mask=visible[:, None, None],
                past_key_values=StepCache(decoder.cache, index, K),
            ).last_hidden_state[:, 0]  # fmt: skip

    return read
