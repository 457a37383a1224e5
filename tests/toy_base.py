"""The toy world's base model, the stand-in for pretrained Qwen2-VL: assets/toy_base was made by

    python tests/toy_base.py --out runs/toy_base

A random Qwen2-VL of a million parameters learns to list, copy and find things (next-token loss only) with the real
sft.py, on files in the published format, easy to hard: single cells, strips, whole scenes; then to follow the
paper's instruction (think, then answer), as an instruction-tuned model does.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support.formats import GEN, INSTRUCTION, SYSTEM  # noqa: E402
from support.toy import (  # noqa: E402
    EXAMPLES,
    PLACES,
    STEPS,
    Side,
    beside,
    compared,
    draw,
    in_parallel,
    listed,
    named,
    page_text,
    row_text,
    stored,
)

BASE = {"list": (0.55, 0.4, 0.17), "copy": (0.25, 0.25, 0.24), "page": (0.2, 0.1, 0.11),
        "at": (0, 0.25, 0.12), "go": (0, 0, 0.16), "row": (0, 0, 0.07), "frames": (0, 0, 0.13)}  # shares per level


def base_example(rng, level, split="train"):
    """One sequence of the pretraining; pictures are 0: one cell, 1: a strip of three, 2: a scene."""
    kind = rng.choice(list(BASE), p=[share[level] for share in BASE.values()])
    few, many = (3, 3) if kind == "frames" else ((1, 1), (2, 3), (3, 6))[level]
    cells = draw(rng, split, few, many, size=(1, 3, 9)[level])
    full = [int(i) for i in rng.permutation(len(cells)) if cells[i]]
    if kind == "page":
        cells = draw(rng, split, 0, 0)
        cells = cells[: 3 * level] or [cells[rng.integers(6)]]
        return Side("read the page", "", page_text(cells), (cells,))
    if kind == "copy":
        texts = [named(cells), listed(cells[:3]), page_text(draw(rng, split, 0, 0)), row_text(cells * 3, 0)]
        text = texts[rng.integers(4)] or " none"
        return Side(f"copy:{text}", "", text)
    if kind == "frames":
        empty = [i for i in range(9) if not cells[i]]
        after = list(cells)
        after[full[0]], after[rng.choice(empty)] = "", cells[full[0]]
        return Side("compare the scenes", "", compared(cells, after), (cells, after))
    if kind == "at":
        some = [int(k) for k in rng.permutation(len(cells))[:4]]
        return Side("what is at" + "".join(f" {PLACES[k]}" for k in some), "",
                    "".join(f" {PLACES[k]} {cells[k] or 'none'}" for k in some), (cells,))
    if kind == "go":
        i, step = int(rng.integers(9)), str(rng.choice(list(STEPS)))
        i, step = (i, step) if beside(i, step) >= 0 else (4, step)
        j = beside(i, step)
        walk = f" {PLACES[i]} {step} {PLACES[j]}"
        return Side(f"from {PLACES[i]} go {step}", "", f"{walk} {cells[j] or 'none'}", (cells,))
    if kind == "row":
        r = int(rng.integers(3))
        return Side(f"read row {PLACES[3 * r]}", "", row_text(cells, r), (cells,))
    return Side("list the objects", "", listed(cells), (cells,))


NAMES = """endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start
vision_end vision_pad image_pad video_pad"""
SPECIAL = [f"<|{name}|>" for name in NAMES.split()]
CHAT = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n" + SYSTEM
    + "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type in ('image', 'video') %}<|vision_start|><|{{ p.type }}_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def toy_tokenizer():
    """Byte-level BPE of Qwen2's kind: reads any text; the toy's words and fixed sentences are one token."""
    rng = np.random.default_rng(0)
    sides = [s for draw_example in EXAMPLES.values() for _ in range(200) for s in draw_example(rng, "train")[:2]]
    sides += [base_example(rng, 2) for _ in range(1000)]
    texts = ["system", "user", "assistant"] + [t for s in sides for t in (s.text, s.think, s.answer)]
    plain = Qwen2Tokenizer().backend_tokenizer
    plain.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    bpe = json.loads(plain.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=bpe["vocab"], merges=[tuple(m) for m in bpe["merges"]],
                               eos_token="<|im_end|>", extra_special_tokens=SPECIAL[1:], chat_template=CHAT)
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", SYSTEM, *INSTRUCTION.split(GEN)])
    return tokenizer


def toy_model(path, seed=0, theta=30.0):
    """A random Qwen2-VL of about a million parameters, saved with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = toy_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": [4, 6, 6]}
    text = {"vocab_size": -(-(len(tokenizer) + 2) // 16) * 16, "hidden_size": 128, "intermediate_size": 384,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "initializer_range": 0.05, "max_position_embeddings": 4096, "rope_parameters": rope,
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2,
              "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.05}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        **{f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"])
    Qwen2VLForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def base_rows(out, seed, level, part, count):
    """Level 3 asks as level 2 does, with the paper's instruction after the question: think, then answer (the same)."""
    rng, rows = np.random.default_rng([seed, 3, level, part]), []
    for i in range(count):
        row = {"dataset_name": "base"}
        for key in ("qry", "pos"):
            side = base_example(rng, min(level, 2))
            files = stored(out, f"base{level}/{part}/{i}{key}", rng, side)
            kind = "video" if files["video"] else "image"
            human, answer = f"<{kind}>{side.text}", side.answer
            if level == 3:
                human, answer = f"{human}\n{INSTRUCTION}", f"<think>{answer}</think><answer>{answer}"
            turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
            row[key] = {kind: files["video"] or files["images"] or "images/blank.jpg", "conversations": turns}
        rows.append(row)
    return rows


def write_base(out, seed, pairs=(3200, 3200, 24000, 5600), parts=4):
    """The pretraining of the stand-in for Qwen2-VL, easy to hard: base_0.json .. base_3.json."""
    jobs = [(base_rows, seed, level, part, n // parts) for level, n in enumerate(pairs) for part in range(parts)]
    done = in_parallel(out, jobs)
    for level in range(len(pairs)):
        rows = sum(done[parts * level : parts * (level + 1)], [])
        (out / f"base_{level}.json").write_text(json.dumps(rows))


def train(out, seed=0):
    """The curriculum with sft.py: next-token loss only, vision tower trained; then fp16 weights for the assets."""
    write_base(out, seed)
    toy_model(out / "random", seed)
    flags = "--w_disc 0 --w_gen 0 --train_vision true --batch_size 16 --warmup 0.1 --seed"
    before = out / "random"
    for level, steps in enumerate((400, 400, 2600, 350)):
        command = f"{sys.executable} sft.py {flags} {seed} --steps {steps} --model {before} --out {out}/level{level} "
        command += f"--data {out}/base_{level}.json --media_root {out} --lr {1e-3 if level == 3 else 2e-3}"
        subprocess.run(command.split(), cwd=ROOT, check=True)
        before = out / f"level{level}"
    Qwen2VLForConditionalGeneration.from_pretrained(before, dtype=torch.float16).save_pretrained(out / "toy_base")
    toy_tokenizer().save_pretrained(out / "toy_base")  # without the two embedding tokens: sft.py adds them


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="runs/toy_base")
    train(parser.parse_args().out)
