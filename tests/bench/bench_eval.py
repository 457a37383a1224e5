"""Compare encoding for evaluation with the official way; python tests/bench/bench.py eval prints the table.

The official evaluation is rewritten from its description in plain transformers. Inputs are in static batches,
generate() returns the states of all layers and steps to read one vector per row, and a second pass over prompts and
images gives disc. Ours is one stream through Embedder.generate() with both embeddings from one pass. Both sides have
the same random Qwen2-VL (text 8 x 512, vision 4 x 320, vocabulary 10,240, so that the head has its share of the work as
in the real 2B), the same inputs with one image of 64 tokens each, and the same completions (lognormal lengths, median
40, sigma 0.5). A logits processor forces them on generate(), a script on ours. Time is CPU seconds on one thread, the
two sides in turn. Memory is the peak of a fresh process above that of the loaded model.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]

from bench_peak import in_fresh_process, peak_above  # noqa: E402
from conftest import generate_all, picture, processor_inputs  # noqa: E402
from toy_base import toy_model  # noqa: E402
from transformers import AutoTokenizer, LogitsProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration  # noqa: E402

from data import encode_input  # noqa: E402
from model import Embedder  # noqa: E402
from support.weights import add_embedding_tokens  # noqa: E402


def random_model(tiny):
    heads, layers = (2, 2) if tiny else (8, 8)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        toy_model(folder)
        config, tokenizer = Qwen2VLConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text, vision = (part.to_dict() for part in (config.text_config, config.vision_config))
    del text["layer_types"]
    text |= {"hidden_size": 64 * heads, "intermediate_size": 256 * heads, "num_hidden_layers": layers,
             "num_attention_heads": heads, "num_key_value_heads": heads // 4 or 1,
             "vocab_size": 2048 if tiny else 10_240}  # fmt: skip
    text["rope_parameters"]["mrope_section"] = [8, 12, 12]
    vision |= {"embed_dim": 40 * heads, "depth": layers // 2, "num_heads": heads // 2, "hidden_size": 64 * heads,
               "mlp_ratio": 4}  # fmt: skip
    more = {name: getattr(config, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id",
                                                      "vision_end_token_id", "tie_word_embeddings")}  # fmt: skip
    backbone = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **more))
    add_embedding_tokens(backbone, tokenizer)
    return Embedder(backbone, tokenizer).eval()


def work(embedder, n):
    """Return n prompts with an image, and a completion of each: random tokens, then <gen_emb>."""
    rng = np.random.default_rng(0)
    rows = [encode_input(embedder.tokenizer, {"text": f"what {i}", "images": [picture(i, 224, 224)]}) for i in range(n)]
    lengths = rng.lognormal(np.log(40), 0.5, n).clip(8, 160).astype(int)
    words = np.setdiff1d(np.arange(len(embedder.tokenizer)), [*embedder.banned.tolist(), embedder.end_id])
    return rows, [[*rng.choice(words, length - 1).tolist(), embedder.gen_id] for length in lengths]


class Forced(LogitsProcessor):
    """Let generate() compute as usual, with one certain token per row."""

    def __init__(self, completions, prompt_length, end):
        longest = max(map(len, completions)) + 1
        self.tokens = torch.tensor([c + [end] * (longest - len(c)) for c in completions])
        self.prompt_length = prompt_length

    def __call__(self, ids, scores):
        return scores.scatter_(1, self.tokens[:, ids.shape[1] - self.prompt_length, None], 1e5)


@torch.no_grad()
def official(embedder, rows, completions, batch):
    """Return disc, gen [n, D] and the number of decode steps."""
    disc, gen, steps = [], [], 0
    for start in range(0, len(rows), batch):
        part, written = rows[start : start + batch], completions[start : start + batch]
        inputs, begin = processor_inputs(embedder, part, left=True)
        embedder.backbone.model.rope_deltas = None
        out = embedder.backbone.generate(
            **inputs, do_sample=False, max_new_tokens=512, eos_token_id=embedder.end_id,
            pad_token_id=embedder.tokenizer.pad_token_id,
            output_hidden_states=True, return_dict_in_generate=True,
            logits_processor=[Forced(written, inputs["input_ids"].shape[1], embedder.end_id)],
        )  # fmt: skip
        gen += [out.hidden_states[len(c)][-1][b, -1] for b, c in enumerate(written)]  # the state of generated token j
        steps += len(out.hidden_states)
        embedder.backbone.model.rope_deltas = None
        states = embedder.backbone(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        disc += [states[b, begin[b] + row.disc_at] for b, row in enumerate(part)]
    return F.normalize(torch.stack(disc), dim=-1), F.normalize(torch.stack(gen), dim=-1), steps


def ours(embedder, rows, completions, batch):
    steps, real = [], embedder.decode_step
    embedder.decode_step = lambda *given: (steps.append(1), real(*given))[1]
    found = generate_all(embedder, rows, script=[[c] for c in completions], temperature=0.0, slots=batch)
    del embedder.decode_step
    done = [found[i] for i in range(len(rows))]
    return torch.stack([r.disc for r in done]), torch.cat([r.gen for r in done]), len(steps)


SIDES = {"official": official, "ours": ours}


def peak(side, n, batch, tiny):
    """Return the peak MiB of one side above the loaded model. Run it in a fresh process."""
    embedder = random_model(tiny)
    rows, completions = work(embedder, n)
    return peak_above(lambda: SIDES[side](embedder, rows, completions, batch))[0]


def bench_eval(n, tiny=False, batch=8, repeats=3):
    torch.set_num_threads(1)
    embedder = random_model(tiny)
    rows, completions = work(embedder, n)
    seconds, out = {"official": [], "ours": []}, {}
    for _ in range(repeats):
        for name, run in SIDES.items():
            start = time.process_time()
            out[name] = run(embedder, rows, completions, batch)
            seconds[name].append(time.process_time() - start)
    apart = [float((a - b).abs().max()) for a, b in zip(out["official"][:2], out["ours"][:2])]
    calls = {name: f"peak({name!r}, {n}, {batch}, {tiny})" for name in SIDES}
    megabytes = {name: in_fresh_process("bench_eval", call, tiny) for name, call in calls.items()}
    median = {name: statistics.median(x) for name, x in seconds.items()}
    print(f"{n} inputs of {len(rows[0].ids)} tokens, {batch} at once, completions of {min(map(len, completions))} to "
          f"{max(map(len, completions))} tokens; largest difference disc {apart[0]:.1e}, gen {apart[1]:.1e}\n"
          "| | CPU s | decode steps | peak MB |\n|---|---|---|---|")  # fmt: skip
    for name in seconds:
        print(f"| {name} | {median[name]:.1f} | {out[name][2]} | {megabytes[name]:.0f} |")
    ratios = [median["official"] / median["ours"], out["official"][2] / out["ours"][2],
              megabytes["official"] / megabytes["ours"]]  # fmt: skip
    print(f"| official / ours | {' | '.join(f'{x:.2f}' for x in ratios)} |")
