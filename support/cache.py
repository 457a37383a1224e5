"""Embeddings on disk: every distinct input is embedded once, and a killed run resumes from the saved embeddings.

OUT/<model name>/cache/KIND-HASH holds the embeddings of one kind ("greedy", "samples", "answers") in shards. HASH
covers everything that decides an embedding except the input: the model's files, the settings and the versions. An
input is found by a hash of its text and the bytes of its media (input_key). No result is ever stale.

Shapes: N inputs, S samples (1 if greedy), D dimensions.
"""

import hashlib
import itertools
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data import encode_input
from model import Embedder, Prompt
from support.distributed import barrier, forked_loader, gather_objects, processes
from support.files import stable_hash, write_file
from support.formats import check_text
from support.images import hash_media, refuse_most_missing
from support.program import BadInput, Progress, Skip
from support.settings import same_on_all_ranks, weights_digest

CACHE_VERSION = 1  # raise it when a change to the code changes embeddings

# --------------------------------------------------------------------------------------------------------------
# The distinct inputs of all tasks


def input_key(item, digests):
    """Return a hash of what the model sees of an input. A missing file counts as its path, until it exists."""
    images = [digests[path] or path for path in item["images"]]
    video = [digests[path] or path for path in item["video"]]
    content = json.dumps([item["text"].strip(), images, video])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


class DistinctInputs:
    """The inputs of all tasks; inputs of equal content are listed once. The queries come first."""

    def __init__(self, tasks, group=None):
        self.row_of = {}  # key of the content -> row of items
        self.items = []
        paths_of = {}  # of the media, by task
        for task in tasks:
            items = [*(query["input"] for query in task.queries), *task.candidates.values()]
            paths_of[task.name] = {path for item in items for path in item["images"] + item["video"]}
        self.digests = hash_media(set().union(*paths_of.values()), group=group)
        for name, paths in paths_of.items():
            refuse_most_missing(paths, self.digests, name, "What is missing and how to get it: python eval.py --check "
                                "--root ROOT")  # fmt: skip
        self.query_rows = [self.add([query["input"] for query in task.queries]) for task in tasks]
        num_queries = len(self.items)  # distinct ones
        self.candidate_rows = [self.add(list(task.candidates.values())) for task in tasks]
        self.keys = list(self.row_of)
        self.query_keys = self.keys[:num_queries]
        self.query_items = self.items[:num_queries]

    def add(self, items):
        """Return the row of each item, [len(items)]."""
        rows = []
        for item in items:
            key = input_key(item, self.digests)
            if key not in self.row_of:
                self.row_of[key] = len(self.items)
                self.items.append(item)
            rows.append(self.row_of[key])
        return np.array(rows)


# --------------------------------------------------------------------------------------------------------------
# From inputs to embeddings


def load_embedder(model, settings, device):
    """Load a model, in bf16 on a GPU and in fp32 on a CPU, with the frame size of --video_max_pixels."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    embedder = Embedder.from_pretrained(model, device=device, dtype=dtype)
    if settings.video_max_pixels:
        check_video_pixels(settings.video_max_pixels, embedder.family)
        least, _ = embedder.family.video_pixels
        embedder.family = replace(embedder.family, video_pixels=(least, settings.video_max_pixels))
    return embedder


def check_video_pixels(most, family):
    least, _ = family.video_pixels
    if 0 < most < least:
        raise BadInput(f"--video_max_pixels {most}: must be at least {least}, four tokens of the model")


def embed_inputs(embedder, inputs, keys, settings, samples=0, answers=None):
    """Yield (key, problem, disc [D], gen [S, D], valid [S], tokens [S], texts) of each input when it is done.

    samples: sampled generations of each input; 0 gives one greedy generation. answers: N assistant texts to read
    instead of generating. The inputs of all tasks form one stream: when a generation ends, the next input takes its
    slot. Every input has its own seed, so its samples do not depend on the rest of the batch.
    """

    def encode(batch):  # in a background worker
        key, item, answer = batch[0]
        name = f"the input {item['text'][:60]!r}"
        try:
            if answer is not None:
                check_text(answer, f"the answer to {name}")
            row = encode_input(embedder.tokenizer, item, answer, blank_image=settings.blank_image, name=name,
                               family=embedder.family)  # fmt: skip
            return Prompt(key, row, stable_hash(settings.seed, key))
        except (Skip, BadInput) as error:
            return Prompt(key, None, problem=str(error))

    answer_of = dict(zip(keys, answers or [None] * len(keys)))
    rows = [(key, item, answer_of[key]) for key, item in zip(keys, inputs)]
    prompts = forked_loader(rows, min(settings.workers, len(rows)), batch_size=1, collate_fn=encode)
    S = max(1, samples)
    D = embedder.width
    if answers is not None:
        results = embedder.read_once(prompts, settings.slots, settings.pass_tokens)
    else:
        results = embedder.generate(prompts, G=S, temperature=settings.temperature if samples else 0.0,
                                    max_new_tokens=settings.max_new_tokens, slots=settings.slots,
                                    pass_tokens=settings.pass_tokens)  # fmt: skip
    for prompt, r in results:
        if r is None:  # a miss
            yield prompt.key, prompt.problem, np.zeros(D), np.zeros((S, D)), np.zeros(S, bool), [0] * S, [""] * S
            continue
        texts = embedder.texts_of(r) if answers is None else [answer_of[prompt.key]]
        yield (prompt.key, "", r.disc.float().cpu().numpy(), r.gen.float().cpu().numpy(), r.valid.numpy(),
               [len(ids) for ids in r.ids], texts)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# The cache of one model


def hash_model(model, device):
    """Return a hash of what decides an embedding, except the input and the settings. model: folder or hub id."""
    about = [CACHE_VERSION, weights_digest(model), torch.__version__, transformers.__version__, device.type]
    return hashlib.blake2b(repr(about).encode(), digest_size=16).hexdigest()


class EmbeddingCache:
    """The embeddings of one model under OUT/<model name>/cache. All ranks call its methods together."""

    def __init__(self, embedder, model, settings, name, group=None):
        """model: the folder or hub id of the embedder; name: of the model's results; group: for long waits."""
        self.embedder = embedder
        self.settings = settings
        self.name = name
        self.group = group
        digest = hash_model(model, embedder.device)
        same_on_all_ranks({f"content of {model}": digest}, group)
        pixels = (embedder.family.image_pixels, embedder.family.video_pixels)
        self.how = [digest, settings.max_new_tokens, settings.blank_image, *pixels]
        self.encoded = {}  # kind -> number of inputs that this run has embedded

    def embed(self, kind, keys, inputs, samples=0, answers=None, everywhere=False):
        """Return the results of all inputs as `collect` does: on rank 0, and on all ranks if `everywhere`.

        samples 0: both embeddings, greedy. samples k: k gen embeddings of each input. answers: assistant texts to
        read instead of generating.
        """
        folder = self.fill(kind, keys, inputs, samples, answers)
        if processes()[0] > 0 and not everywhere:
            return None
        return collect(folder, keys)

    def texts(self, kind, keys, inputs, samples=0):
        """Return what the model writes for all inputs, N lists of texts, on all ranks."""
        return collect_texts(self.fill(kind, keys, inputs, samples), keys)

    def fill(self, kind, keys, inputs, samples, answers=None):
        """Embed the inputs that are missing in the folder, and return the folder."""
        folder = self.folder(kind, samples)
        rank, world = processes()
        todo = self.missing(folder, keys, inputs)
        own = todo[rank::world]
        own_inputs = [inputs[n] for n in own]
        own_keys = [keys[n] for n in own]
        own_answers = [answers[n] for n in own] if answers is not None else None
        results = embed_inputs(self.embedder, own_inputs, own_keys, self.settings, samples, own_answers)
        title = f"{self.name} {kind}"
        bar = Progress(results, total=len(own), desc=title, unit="input", disable=rank > 0 or not own)
        write_shards(bar, folder, self.settings)
        barrier(self.group)
        self.encoded[kind] = self.encoded.get(kind, 0) + len(todo)
        if rank == 0:
            others = f", the others from {folder}" if len(todo) < len(keys) else ""
            print(f"{title}: {len(todo):,} of {len(keys):,} inputs embedded{others}", flush=True)
        return folder

    def folder(self, kind, samples):
        draw = (samples, self.settings.temperature, self.settings.seed) if samples else ()
        digest = hashlib.blake2b(repr([self.how, draw]).encode(), digest_size=8).hexdigest()
        out = Path(self.settings.out)
        folder = out / self.name / "cache" / f"{kind}-{digest}"
        under_other_names = sorted(out.glob(f"*/cache/{kind}-{digest}"))  # "sft" is "seed0-sft" next to "seed1-sft"
        return under_other_names[0] if under_other_names and not folder.exists() else folder

    def missing(self, folder, keys, inputs):
        """Return the indices of the inputs that the folder has no embedding of; the same list on all ranks."""
        folder.mkdir(parents=True, exist_ok=True)
        done = set()
        for rows, _ in shards(folder):
            done.update(key for key, problem, _ in rows if not problem)  # an input with a problem is tried again
        if processes()[0] == 0:
            for path in folder.glob("*.tmp"):  # of a killed run
                path.unlink()
        barrier(self.group)  # no rank writes before all ranks have listed the folder
        todo = [n for n, key in enumerate(keys) if key not in done]
        todo = sorted(todo, key=lambda n: estimated_cost(inputs[n]), reverse=True)
        return gather_objects(todo, self.group)[0]  # nodes may see other file sizes


def estimated_cost(item):
    """Return a sort key: frames, bytes of the images, characters. The longest first: see Embedder.prompts_of."""
    sizes = [os.path.getsize(path) for path in item["images"] if os.path.exists(path)]
    return len(item["video"]), sum(sizes), len(item["text"])


# --------------------------------------------------------------------------------------------------------------
# Shards


def write_shards(results, folder, settings):
    """Write results to shards of this rank, so that a kill costs at most --save_every inputs. Up to --slots of
    them are being computed."""
    size = max(1, settings.save_every - settings.slots)
    results = iter(results)
    last = time.time()
    while part := list(itertools.islice(results, size)):
        save_shard(folder, part, time.time() - last)
        last = time.time()


def save_shard(folder, results, elapsed):
    key, problem, disc, gen, valid, tokens, texts = zip(*results)
    arrays = {
        "disc": np.stack(disc).astype(np.float32),
        "gen": np.stack(gen).astype(np.float32),
        "valid": np.stack(valid),
        "tokens": np.array(tokens),
        "seconds": np.full(len(results), elapsed / len(results)),  # inputs that are decoded together share the time
    }
    rows = json.dumps(list(zip(key, problem, texts)))
    path = folder / f"{time.time_ns()}-{processes()[0]}.safetensors"
    write_file(path, lambda temporary: save_file(arrays, temporary, {"rows": rows}))


def shards(folder):
    """Yield (rows as [key, problem, texts], open file) of every shard of a cache folder."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = safe_open(path, "np")
        except SafetensorError as error:  # a broken disk: the inputs are embedded again
            print(f"{path}: not readable ({error}), left out", file=sys.stderr)
            continue
        with file:
            yield json.loads(file.metadata()["rows"]), file


def collect(folder, keys):
    """Return the cached results in the order of keys.

    disc [N, D], gen [N, S, D], valid [N, S], tokens [N, S], seconds [N], texts: N lists, problem [N] ("" if the input
    was readable), not_finite [N] (a gen embedding that is not finite is not valid either).
    """
    row_of = {key: n for n, key in enumerate(keys)}
    arrays = {}
    texts = [None] * len(keys)
    problems = [""] * len(keys)
    filled = set()
    for shard_rows, file in shards(folder):
        wanted = [(i, row_of[key]) for i, (key, *_) in enumerate(shard_rows) if key in row_of]
        if not wanted:
            continue
        source, target = (list(indices) for indices in zip(*wanted))
        filled.update(target)
        for name in file.keys():  # noqa: SIM118 (the file is no dict)
            part = file.get_tensor(name)
            if name not in arrays:
                arrays[name] = np.zeros((len(keys), *part.shape[1:]), part.dtype)
            arrays[name][target] = part[source]
        for i, n in wanted:
            _, problems[n], texts[n] = shard_rows[i]
    missing = len(keys) - len(filled)
    assert not missing, f"{folder} has no embedding of {missing} inputs: was it changed during the run?"

    arrays |= {"texts": texts, "problem": np.array(problems)}
    valid = usable_gen(arrays)
    disc_not_finite = (arrays["problem"] == "") & ~usable_disc(arrays)
    gen_not_finite = (arrays["valid"] & ~valid).any(1)
    return arrays | {"valid": valid, "not_finite": disc_not_finite | gen_not_finite}


def collect_texts(folder, keys):
    """Return the cached texts in the order of keys, N lists."""
    text_of = {}
    for shard_rows, _ in shards(folder):
        text_of.update((key, texts) for key, _, texts in shard_rows)
    return [text_of[key] for key in keys]


def take(arrays, rows):
    """Return the rows of a task."""
    if arrays is None:
        return None
    return {key: arrays[key][rows] for key in ("disc", "gen", "valid", "problem")}


# --------------------------------------------------------------------------------------------------------------
# Misses


def usable_disc(arrays):
    """Return bool [N]: which disc embeddings count. An embedding that is not finite is a miss.

    NaN scores would keep the order of the list. Published local tasks list the right answer first, so a broken model
    would score 100 %.
    """
    return (arrays["problem"] == "") & np.isfinite(arrays["disc"]).all(-1)


def usable_gen(arrays):
    """Return bool [N, S]: which gen embeddings count."""
    return arrays["valid"] & np.isfinite(arrays["gen"]).all(-1)


def generation_metrics(greedy, rows):
    """Return the counts and costs of a task for scores.json. rows: of all its queries and candidates."""
    return {
        "invalid": int((~greedy["valid"][rows]).sum()),  # answers without a <gen_emb>, or with one that is not finite
        "not_finite": int(greedy["not_finite"][rows].sum()),  # inputs with NaN or infinity in an embedding
        "unreadable": int((greedy["problem"][rows] != "").sum()),  # inputs that are misses in every mode
        "tokens_per_input": float(greedy["tokens"][rows].mean()),  # of the answers
        "seconds": float(greedy["seconds"][np.unique(rows)].sum()),  # of one rank; each distinct input once
    }


def print_misses(name, greedy):
    not_finite = int(greedy["not_finite"].sum())
    if not_finite:
        print(f"{name}: {not_finite} of {len(greedy['problem'])} inputs have an embedding that is not finite (NaN or "
              "infinite) and count as misses; are the weights broken?", flush=True)  # fmt: skip
    problems = [problem for problem in greedy["problem"] if problem]
    if problems:
        print(f"{len(problems)} inputs (or answers) cannot be read and count as misses; the first: {problems[0]}",
              flush=True)  # fmt: skip
