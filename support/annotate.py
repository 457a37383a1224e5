"""The paper's data (commands of data.py): a teacher annotates pairs with reasoning and summaries, filters drop bad
rows, and the RL subset is drawn from the pairs that are left.

    bare pairs -> read_pairs -> a teacher's answers (kept on disk) -> judge -> SFT rows
"""

import contextlib
import itertools
import json
import re
import time
from collections import Counter, deque
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from data import (
    DISC,
    FAMILIES,
    GEN,
    IMAGE_MARK,
    VIDEO_MARK,
    Skip,
    check_input,
    check_keys,
    check_text,
    content_key,
    encode,
    encode_input,
    media_marks,
    open_picture,
    rl_row,
    rl_side,
    sft_row,
    sft_side,
    thinned,
    without_marks,
)
from model import Embedder, Prompt, check_model
from support.rows import dataset_of, scan_rows, write_rows
from support.run import (
    BadInput,
    MissingFile,
    Progress,
    barrier,
    end_processes,
    hold,
    read_json,
    stable_hash,
    start_processes,
    write_json,
)

ASK = (
    "This is the {role} of a search: {what}. Think it through first, between <think> and </think>: what it shows or "
    "says, which details matter, what it asks for and what follows from it, step by step. Then write one short summary "
    "between <answer> and </answer> that could be searched for in its place: the answer where there is a question, "
    "otherwise what it is about, with the names, numbers and actions that set it apart. If the {role} is a single word "
    "or phrase, the summary is exactly that word or phrase."
)
ROLES = {"qry": ("query", "what somebody looks for"), "pos": ("candidate", "one of the things that can be found")}
FRAME_SIDE = 448  # a foreign teacher sees a video as pictures no larger than this: 256 tokens each for most
OWN_CALL = 8  # batches in one call of our decode loop, which refills ended places
STRAY = re.compile(r"<\|[^<>|]*\|>|</?(?:think|answer|s|pad|eos|image|video)>|<(?:gen|disc)_emb>|\[/?INST\]")


def read_pairs(files):
    """Files of pairs -> list of {"dataset_name", "qry": input, "pos": input}, reasoning left out. Four formats:

    {"dataset_name", "qry": {"text", "images": [path], "video": [frame path]}, "pos": {...}} (all but one key of a side
    optional); RL rows; SFT rows; MMEB-train's parquet (its dataset is named by the folder).
    """
    pairs = []
    for file in files:
        if Path(file).suffix == ".parquet":
            import pyarrow.parquet

            if not Path(file).is_file():
                raise MissingFile(f"{file}: no such file")
            try:
                table = pyarrow.parquet.read_table(file)
            except (OSError, ValueError) as error:  # what pyarrow says of a file that is torn or not there
                raise BadInput(f"{file}: cannot be read as parquet ({error}); copy it again") from error
            batches = table.to_batches(max_chunksize=1024)
            name, rows = Path(file).resolve().parent.name, (row for batch in batches for row in batch.to_pylist())
        else:
            name, rows = "", (row for _, _, row in scan_rows(file))  # one by one: the reasoning left out has gigabytes
        for i, row in enumerate(rows):
            if isinstance(row.get("qry"), dict):
                check_keys(row, "a pair", f"{file}, row {i}")
            elif "qry_image_path" in row:
                check_keys(row, "a row of MMEB-train", f"{file}, row {i}")
            sides = {side: bare_side(row, side, f"{file}, row {i}, {side}") for side in ("qry", "pos")}
            pairs.append({"dataset_name": dataset_of(row) or name, **sides})
    return pairs


def bare_side(row, side, name):
    """One side of a pair in any of read_pairs' formats -> input dict: media paths, and the text without marks."""
    given, video = row.get(side), []
    if isinstance(given, dict) and "conversations" in given:
        text, images, video, _ = sft_side(given, name)
        media_marks(text, images, video, name)
        text = re.sub(f"{IMAGE_MARK}|{VIDEO_MARK}", "", text.split(DISC)[0])
    elif isinstance(given, dict):
        text, images, video = check_input(given, name).values()
    elif f"{side}_image_path" in row:  # MMEB-train calls the query's text "qry", the target's "pos_text"
        text = given if side == "qry" else row.get("pos_text")
        text, images, video = check_input({"text": text, "images": row[f"{side}_image_path"]}, name).values()
    else:
        text, images, video = rl_side(row, side, name).values()
    text = re.sub(r"<\|image_\d+\|>", "", without_marks(text, images, video)).strip()
    images = [path for path in images if str(path) not in ("blank.jpg", "images/blank.jpg")]  # they say "no picture"
    if not (text or images or video):
        raise BadInput(f"{name}: neither text nor media; fill the side or take the row out")
    if images and video:
        raise BadInput(f"{name}: has both an image and a video; SFT files allow one of them")
    check_text(text, name)
    return {"text": text, "images": images, "video": video}


def side_key(side, item):
    return f"{side} {content_key(**item)}"


# Teachers: functions (inputs with opened pictures, their keys) -> [{"text", "tokens", "ended"}] in this order


def own_teacher(args, device):
    """A Qwen2-VL, read by our decode loop: one with the embedding tokens speaks our format, others are asked for it."""
    ours = GEN in AutoTokenizer.from_pretrained(args.teacher).get_vocab()  # Embedder would add it
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    embedder = Embedder.from_pretrained(args.teacher, device=device, dtype=dtype)

    def encode_one(item, key):
        if ours:
            return encode_input(embedder.tokenizer, item, name=key, family=embedder.family)
        human = IMAGE_MARK * len(item["images"]) + VIDEO_MARK * bool(item["video"]) + question(item, key)
        return encode(embedder.tokenizer, human, item["images"], item["video"], name=key, family=embedder.family)

    def ask(items, keys):
        prompts = [Prompt(key, encode_one(item, key), stable_hash(args.seed, key)) for item, key in zip(items, keys)]
        answers = {}
        for prompt, r in embedder.generate(
            prompts, temperature=args.temperature, max_new_tokens=args.max_new_tokens, slots=args.batch_size
        ):
            ids = r.ids[0]
            text = embedder.texts_of(r)[0]
            answers[prompt.key] = {"text": text, "tokens": len(ids), "ended": ids[-1] == embedder.end_id}
        return [answers[key] for key in keys]

    return ask


def foreign_teacher(args, device):
    """Any other image-text-to-text model of transformers, by its own processor and generate(); videos as pictures."""
    try:
        processor = AutoProcessor.from_pretrained(args.teacher)
    except ImportError as error:  # of the video part of most processors
        cure = "pip install torchvision" if "orchvision" in str(error) else str(error).strip()
        raise SystemExit(f"--teacher {args.teacher}: its processor needs another package: {cure}") from error
    if not hasattr(processor, "image_processor") or not processor.chat_template:
        raise SystemExit(f"--teacher {args.teacher}: has no picture processor or no chat template")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(args.teacher, dtype=dtype).to(device).eval()
    tokenizer = processor.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    ends = np.atleast_1d(model.generation_config.eos_token_id).tolist()
    how = {"temperature": args.temperature, "top_k": 0, "top_p": 1.0} if args.temperature else {}

    def ask(items, keys):
        torch.manual_seed(stable_hash(args.seed, *keys))  # samples do not depend on the calls before
        conversations = []
        for item, key in zip(items, keys):
            for frame in item["video"]:
                frame.thumbnail((FRAME_SIDE, FRAME_SIDE))
            content = [{"type": "image", "image": picture} for picture in item["images"] + item["video"]]
            frames = "The pictures are frames of one video, in order.\n" * bool(item["video"])
            content.append({"type": "text", "text": frames + question(item, key)})
            conversations.append([{"role": "user", "content": content}])
        inputs = processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(device, dtype=dtype)  # fmt: skip
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=bool(how), **how)
        answers = []
        for ids in out[:, inputs["input_ids"].shape[1] :].tolist():
            n = next((i for i, t in enumerate(ids) if t in ends), len(ids))  # behind it is padding
            answers.append({"text": tokenizer.decode(ids[:n]), "tokens": n, "ended": n < len(ids)})
        return answers

    return ask


def question(item, key):
    """The text that a teacher is asked, below the side's media."""
    role, what = ROLES[key.split()[0]]
    return f"{item['text']}\n\n{ASK.format(role=role, what=what)}"


def opened(item, root):
    """The input with its pictures opened, a video thinned out. Raises Skip where one cannot be used."""
    if mark := re.search(f"{IMAGE_MARK}|{VIDEO_MARK}", item["text"]):
        raise Skip(f"the text holds a literal {mark[0]}, which an SFT row would take for the mark of a picture")
    images = [open_picture(path, root) for path in item["images"]]
    video = [open_picture(path, root) for path in thinned(item["video"])]
    return item | {"images": images, "video": video}


def teacher_calls(items, size):
    """Which inputs are asked together, as lists of numbers: same numbers of frames and pictures, long texts first.

    A function of the inputs only: whatever was killed in between and however many processes share the calls, every
    answer is computed beside the same others, so that rounding is the same too.
    """
    shape = [(len(item["video"]), len(item["images"]), len(item["text"])) for item in items]
    order = sorted(range(len(items)), key=lambda n: (*(-x for x in shape[n]), n))
    groups = [list(group) for _, group in itertools.groupby(order, key=lambda n: shape[n][:2])]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def find_answers(folder):
    """key -> (side file, offset) of every complete line; a last line that a kill has torn is not there."""
    found = {}
    for path in sorted(Path(folder).glob("answers-*.jsonl")):
        with open(path, "rb") as file:
            start = 0
            for line in file:
                with contextlib.suppress(ValueError):  # torn by a kill, or the zeros of a crash
                    if line.endswith(b"\n"):
                        found[json.loads(line)["key"]] = path, start
                start += len(line)
    return found


# Filters: pure functions of one answer


def too_long(answer, bound):
    return not answer["ended"] or answer["tokens"] > bound  # not ended: cut off at --max_new_tokens


def split_answer(text):
    """(reasoning, summary), or None where the form is wrong. The opening <think> may stand in the teacher's prompt,
    <answer> may be missing or a box (GLM-4.1V and 4.5V), <gen_emb> or </answer> may close it."""
    text = re.sub(r"<\|(begin|end)_of_box\|>", "", text).strip()
    form = r"(?:<think>)?(.*?)</think>\s*(?:<answer>)?(.*?)(?:<gen_emb>|</answer>|\s)*"
    match = re.fullmatch(form, text, re.DOTALL)
    return (match[1].strip("\n"), match[2].strip("\n")) if match and match[1].strip() else None


def repeated_share(text, n=4, window=200):
    """Share of a text's n-word sequences that occurred before in it: the worst of the whole and of its windows.

    Ordinary reasoning is far below 0.2; a loop of a few sentences, anywhere in it, above 0.5. A short text may say a
    list twice: fewer than 50 sequences count as 50.
    """
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|\w{1,20}|[^\w\s]", text.lower())  # Chinese by character
    grams = list(zip(*(words[k:] for k in range(n))))
    parts = [grams] + [grams[s : s + window] for s in range(0, len(grams) - window // 2, window // 2)]
    return max((len(part) - len(set(part))) / max(len(part), 50) for part in parts)


def judge(answer, max_tokens, max_repeat):
    """(reason to reject, None), or ("", (reasoning, summary)). The first reason counts."""
    if "error" in answer:
        return "media", None
    if too_long(answer, max_tokens):
        return "too long", None
    parts = split_answer(answer["text"])
    if parts is None:
        return "malformed", None
    if any(STRAY.search(part) for part in parts):
        return "stray token", None
    if not parts[1].strip():
        return "empty summary", None
    if max(repeated_share(part) for part in parts) > max_repeat:
        return "repetition", None
    return "", parts


REASONS = ("media", "too long", "malformed", "stray token", "empty summary", "repetition")


def filter_answers(pairs, folder, args):
    """Writes --out and, beside the raw answers, rejected.jsonl and report.txt."""
    found, counts, lengths = find_answers(folder), {}, {"qry": Counter(), "pos": Counter()}

    def answer(key):
        path, start = found[key]
        with open(path, "rb") as file:
            file.seek(start)
            return json.loads(file.readline())

    def kept(rejected):
        for i, pair in enumerate(Progress(pairs, desc="filter", unit="pair")):
            answers = {side: answer(side_key(side, pair[side])) for side in ("qry", "pos")}
            judged = {side: judge(a, args.max_tokens, args.max_repeat) for side, a in answers.items()}
            bad = {side: reason for side, (reason, _) in judged.items() if reason}
            count = counts.setdefault(pair["dataset_name"], Counter())
            count[next(iter(bad.values()), "kept")] += 1  # a pair counts once, the query's reason first
            if bad:
                line = {"row": i, "dataset_name": pair["dataset_name"], "reasons": bad}
                rejected.write(json.dumps(line) + "\n")
                continue
            for side, a in answers.items():
                lengths[side][a["tokens"].bit_length()] += 1
            yield sft_row(pair, {side: parts for side, (_, parts) in judged.items()})

    with open(folder / "rejected.jsonl", "w", encoding="utf-8") as rejected:
        write_rows(args.out, kept(rejected))
    report = filter_report(counts, lengths)
    (folder / "report.txt").write_text(report + "\n", encoding="utf-8")
    print(f"{report}\nwrote {args.out}; raw answers, rejected.jsonl and report.txt are in {folder}")


def filter_report(counts, lengths):
    """Kept share and reasons per dataset, and how long the good answers are, as text."""
    total = sum(counts.values(), Counter())
    lines = [f"{'dataset':24}{'pairs':>9}{'kept':>8}" + "".join(f"{reason:>15}" for reason in REASONS)]
    for name, count in [*sorted(counts.items()), ("all", total)]:
        n = sum(count.values())
        shares = "".join(f"{count[reason] / n:15.1%}" for reason in REASONS)
        lines.append(f"{name[:23]:24}{n:9,}{count['kept'] / n:8.1%}{shares}")
    for side, histogram in lengths.items():
        lines.append(f"\ntokens of the kept answers, {ROLES[side][0]}")
        for bits in range(min(histogram, default=0), max(histogram, default=-1) + 1):
            share = histogram[bits] / sum(histogram.values())
            lines.append(f"{f'below {1 << bits:,}':>14}{share:7.1%} {'#' * round(50 * share)}")
    return "\n".join(lines)


def annotate(args):
    """Asks the teacher for every distinct side, shared out over the processes, then filters. A killed run goes on
    where it was; with all answers there, only the filters run (again)."""
    folder = Path(f"{args.out}.answers")
    if Path(args.out).exists() and not folder.is_dir():
        raise BadInput(f"--out {args.out} is a file that annotate has not made; give another name")
    pairs = read_pairs(args.pairs)
    if not pairs:
        raise SystemExit(f"{', '.join(args.pairs)}: no rows")
    check_model(args.teacher)
    rank, world, device = start_processes()
    hold(folder)
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if world > 1 else None  # waits for the slowest

    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(args.teacher).glob("*.safe*")]
    asked = {key: getattr(args, key) for key in ("teacher", "max_new_tokens", "temperature", "seed")}
    asked |= {"weights": stable_hash(*sorted(weights)), "ask": ASK}  # another model may come under the same name
    known = folder / "settings.json"
    before = read_json(known) if known.exists() else asked
    if changed := [f"{key} {before[key]} -> {asked[key]}" for key in asked if before[key] != asked[key]]:
        raise SystemExit(f"{folder} holds answers to other settings ({'; '.join(changed)}); give another --out")
    barrier(group)  # all have read it
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, asked)
    sides = {side_key(side, pair[side]): pair[side] for pair in pairs for side in ("qry", "pos")}
    try:
        own = AutoConfig.from_pretrained(args.teacher).model_type in FAMILIES
    except (OSError, ValueError) as error:
        raise BadInput(f"--teacher {args.teacher}: cannot be loaded ({str(error).splitlines()[0]})") from error
    found, keys = find_answers(folder), list(sides)
    calls = teacher_calls([sides[key] for key in keys], args.batch_size * (OWN_CALL if own else 1))
    calls = [[keys[n] for n in call] for call in calls]
    todo = [call for call in calls if not all(key in found for key in call)]
    barrier(group)  # all have read the side files before one writes: they agree on what is left to do

    if mine := todo[rank::world]:
        ask = (own_teacher if own else foreign_teacher)(args, device)
        bar = Progress(total=len(sides), initial=len(sides) - sum(map(len, todo)), desc="annotate", unit="side",
                   disable=rank > 0, smoothing=0.1)  # fmt: skip
        with open(folder / f"answers-{time.time_ns()}-{rank}.jsonl", "x", encoding="utf-8") as file:
            for c, call in enumerate(mine):
                inputs, answers = {}, {}
                for key in call:
                    try:
                        inputs[key] = opened(sides[key], args.media_root)
                    except Skip as error:
                        answers[key] = {"error": str(error)}
                if inputs:
                    answers |= zip(inputs, ask(list(inputs.values()), list(inputs)))
                file.write("".join(json.dumps({"key": key, **answers[key]}) + "\n" for key in call))
                file.flush()
                bar.update(sum(map(len, todo[c * world : (c + 1) * world])))  # process 0 speaks for all
        bar.close()
    barrier(group)
    if rank == 0:
        filter_answers(pairs, folder, args)
    barrier(group)
    end_processes()


# ---------------------------------------------------------------------------------------------------------------
# The RL subset


def rl_subset(args):
    """A balanced draw from --pairs without what --sft holds: one pair of each modality in turn, in it one of each
    dataset in turn; where one runs out the others fill up."""
    try:
        re.compile(args.visdoc)
    except re.error as error:
        raise BadInput(f"--visdoc {args.visdoc}: no regular expression ({error})") from error
    pairs = read_pairs(args.pairs)

    def content(pair):
        return content_key(**pair["qry"]), content_key(**pair["pos"])

    def modality(pair):
        if re.search(args.visdoc, pair["dataset_name"], re.IGNORECASE):
            return "visdoc"
        return "video" if pair["qry"]["video"] or pair["pos"]["video"] else "image"

    seen = {content(pair) for pair in read_pairs(args.sft)}
    pools, n_sft = {"image": {}, "video": {}, "visdoc": {}}, len(seen)
    for i in np.random.default_rng(args.seed).permutation(len(pairs)):
        if content(pairs[i]) not in seen:
            seen.add(content(pairs[i]))
            pools[modality(pairs[i])].setdefault(pairs[i]["dataset_name"], []).append(pairs[i])
    turns, chosen = {kind: deque(pool[name] for name in sorted(pool)) for kind, pool in pools.items()}, []
    while len(chosen) < args.size and any(turns.values()):
        for queue in filter(None, turns.values()):
            chosen.append(queue[0].pop())
            queue.rotate(-1) if queue[0] else queue.popleft()
    chosen = chosen[: args.size]
    write_rows(args.out, (rl_row(pair) for pair in chosen))
    counts = Counter((modality(pair), pair["dataset_name"]) for pair in chosen)
    print("\n".join(f"{kind:8}{name:32}{n:7,}" for (kind, name), n in sorted(counts.items())))
    print(f"{len(chosen):,} of {len(pairs):,} pairs, none of the {n_sft:,} of --sft; wrote {args.out}")
