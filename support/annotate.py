"""The paper's data (commands of data.py): a teacher annotates pairs with reasoning and summaries, filters drop bad
rows, and the RL subset is sampled from the remaining pairs.

    bare pairs -> read_pairs -> a teacher's answers (saved on disk) -> judge -> SFT rows

A pair is {"dataset_name", "qry": item, "pos": item}, an item is {"text", "images": [path], "video": [frame path]}. A
side is "qry" or "pos". The key of an item, side_key(), is its side and its content (the text and the bytes of its
media), so the teacher annotates an item only once, even if many pairs share it.
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

from data import encode, encode_input
from model import Embedder, Prompt
from support.backbones import FAMILIES
from support.distributed import barrier, end_processes, gather_objects, processes, start_processes
from support.files import dataset_of, read_json, read_parquet, scan_rows, stable_hash, write_json, write_rows
from support.formats import (
    DISC,
    GEN,
    IMAGE_MARK,
    VIDEO_MARK,
    check_input,
    check_keys,
    check_text,
    content_key,
    is_stand_in,
    media_marks,
    rl_row,
    rl_side,
    sft_row,
    sft_side,
    without_marks,
)
from support.images import hash_media, open_image, refuse_most_missing, thinned
from support.program import BadInput, Progress, Skip, text_table
from support.settings import Command, changes, hold, same_on_all_ranks, weights_digest
from support.weights import check_model

ASK = (
    "This is the {role} of a search: {what}. Think it through first, between <think> and </think>: what it shows or "
    "says, which details matter, what it asks for and what follows from it, step by step. Then write one short summary "
    "between <answer> and </answer> that could be searched for in its place: the answer where there is a question, "
    "otherwise what it is about, with the names, numbers and actions that set it apart. If the {role} is a single word "
    "or phrase, the summary is exactly that word or phrase."
)
SIDES = ("qry", "pos")
ROLES = {"qry": ("query", "what somebody looks for"), "pos": ("candidate", "one of the things that can be found")}
FRAME_SIDE = 448  # pixels; a foreign teacher sees a video as images of at most this size: 256 tokens each for most
OWN_CALL = 8  # batches in one call of our decode loop, which refills the slots of finished answers
ANY_MARK = f"{IMAGE_MARK}|{VIDEO_MARK}"
STRAY = re.compile(r"<\|[^<>|]*\|>|</?(?:think|answer|s|pad|eos|image|video)>|<(?:gen|disc)_emb>|\[/?INST\]")


# ---------------------------------------------------------------------------------------------------------------
# Bare pairs


def read_pairs(files):
    """Return the list of pairs of the given files, without reasoning. There are four formats:

    {"dataset_name", "qry": {"text", "images": [path], "video": [frame path]}, "pos": {...}} (each side needs at
    least one key); RL rows; SFT rows; MMEB-train's parquet (the folder's name is the dataset's name).
    """
    pairs = []
    for file in files:
        is_parquet = Path(file).suffix == ".parquet"
        folder_name = Path(file).resolve().parent.name if is_parquet else ""
        rows = read_parquet(file) if is_parquet else (row for _, _, row in scan_rows(file))  # reasoning takes gigabytes
        for i, row in enumerate(rows):
            name = f"{file}, row {i}"
            if isinstance(row.get("qry"), dict):
                check_keys(row, "a pair", name)
            elif "qry_image_path" in row:
                check_keys(row, "a row of MMEB-train", name)
            sides = {side: bare_side(row, side, f"{name}, {side}") for side in SIDES}
            pairs.append({"dataset_name": dataset_of(row) or folder_name, **sides})
    return pairs


def bare_side(row, side, name):
    """Return one side of a row in any format of read_pairs as an item: media paths, and the text without marks."""
    item = given_side(row, side, name)
    text = re.sub(r"<\|image_\d+\|>", "", without_marks(item)).strip()
    images = [path for path in item["images"] if not is_stand_in(path)]
    video = item["video"]
    if not (text or images or video):
        raise BadInput(f"{name}: no text and no media. Fill the side or remove the row")
    if images and video:
        raise BadInput(f"{name}: has both an image and a video, but SFT files allow only one of them. Remove one")
    check_text(text, name)
    return {"text": text, "images": images, "video": video}


def given_side(row, side, name):
    """Return one side of a row as an item. For an SFT row this is only the text before <disc_emb>."""
    given = row.get(side)
    if isinstance(given, dict) and "conversations" in given:
        item, _ = sft_side(given, name)
        media_marks(item, name)
        text, *_ = item["text"].split(DISC)
        return item | {"text": re.sub(ANY_MARK, "", text)}
    if isinstance(given, dict):
        return check_input(given, name)
    if f"{side}_image_path" in row:  # MMEB-train calls the query's text "qry", the target's "pos_text"
        text = given if side == "qry" else row.get("pos_text")
        return check_input({"text": text, "images": row[f"{side}_image_path"]}, name)
    return rl_side(row, side, name)


def side_key(side, item, digests):
    """Return the side, text and bytes of the media as a key. A missing file counts as its path until it exists."""
    images = [digests[path] or path for path in item["images"]]
    video = [digests[path] or path for path in item["video"]]
    return f"{side} {content_key(item['text'], images, video)}"


def keys_of_sides(pairs, digests):
    """Return {key: item} of all sides, each content once, in the order of the pairs."""
    items = {}
    for pair in pairs:
        for side in SIDES:
            items[side_key(side, pair[side], digests)] = pair[side]
    return items


# ---------------------------------------------------------------------------------------------------------------
# Teachers: functions (items with opened images, their keys) -> [{"text", "tokens", "ended"}] in this order


def own_teacher(args, device):
    """Return a teacher of our families, run by our decode loop. A model with the embedding tokens already writes our
    format; the prompt asks every other model for it."""
    ours = GEN in AutoTokenizer.from_pretrained(args.teacher).get_vocab()  # checked here, because Embedder adds it
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    embedder = Embedder.from_pretrained(args.teacher, device=device, dtype=dtype)

    def prompt_of(item, key):
        seed = stable_hash(args.seed, key)
        if ours:
            return Prompt(key, encode_input(embedder.tokenizer, item, name=key, family=embedder.family), seed)
        marks = IMAGE_MARK * len(item["images"]) + VIDEO_MARK * bool(item["video"])
        asked = item | {"text": marks + question(item, key)}
        return Prompt(key, encode(embedder.tokenizer, asked, name=key, family=embedder.family), seed)

    def ask(items, keys):
        prompts = [prompt_of(item, key) for item, key in zip(items, keys)]
        generated = embedder.generate(prompts, temperature=args.temperature, max_new_tokens=args.max_new_tokens,
                                      slots=args.batch_size)  # fmt: skip
        answers = {}
        for prompt, rollouts in generated:
            ids = rollouts.ids[0]
            text = embedder.texts_of(rollouts)[0]
            answers[prompt.key] = {"text": text, "tokens": len(ids), "ended": ids[-1] == embedder.end_id}
        return [answers[key] for key in keys]

    return ask


def foreign_teacher(args, device):
    """Return any other image-text-to-text model as a teacher, with its own generate(); videos become images."""
    processor = load_processor(args.teacher)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(args.teacher, dtype=dtype).to(device).eval()
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    ends = np.atleast_1d(model.generation_config.eos_token_id).tolist()
    sampling = {"temperature": args.temperature, "top_k": 0, "top_p": 1.0} if args.temperature else {}

    def ask(items, keys):
        torch.manual_seed(stable_hash(args.seed, *keys))  # samples do not depend on earlier calls
        inputs = processor.apply_chat_template(
            [conversation(item, key) for item, key in zip(items, keys)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        inputs = inputs.to(device, dtype=dtype)
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=bool(sampling), **sampling)
        n_prompt = inputs["input_ids"].shape[1]
        answers = []
        for ids in out[:, n_prompt:].tolist():
            n = next((i for i, token in enumerate(ids) if token in ends), len(ids))  # the rest is padding
            answers.append({"text": tokenizer.decode(ids[:n]), "tokens": n, "ended": n < len(ids)})
        return answers

    return ask


def load_processor(teacher):
    try:
        processor = AutoProcessor.from_pretrained(teacher)
    except ImportError as error:  # raised by the video part of most processors
        cure = "pip install torchvision" if "orchvision" in str(error) else str(error).strip()
        raise SystemExit(f"--teacher {teacher}: its processor needs another package: {cure}") from error
    if not hasattr(processor, "image_processor") or not processor.chat_template:
        raise SystemExit(f"--teacher {teacher}: has no image processor or no chat template. Give another model")
    return processor


def conversation(item, key):
    """Return an item as the user's turn in transformers' form. The frames of a video become smaller images."""
    for frame in item["video"]:
        frame.thumbnail((FRAME_SIDE, FRAME_SIDE))
    content = [{"type": "image", "image": image} for image in item["images"] + item["video"]]
    text = question(item, key)
    if item["video"]:
        text = f"The images are frames of one video, in order.\n{text}"
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


def question(item, key):
    """Return the text of the prompt, which follows the item's media."""
    side = key.split()[0]
    role, what = ROLES[side]
    return f"{item['text']}\n\n{ASK.format(role=role, what=what)}"


def opened(item, root):
    """Return the item with opened images and a thinned-out video. Raises Skip if an image is unusable."""
    mark = re.search(ANY_MARK, item["text"])
    if mark:
        raise Skip(f"the text has a literal {mark[0]}, which an SFT row would read as the mark of an image")
    images = [open_image(path, root) for path in item["images"]]
    video = [open_image(path, root, is_frame=True) for path in thinned(item["video"])]
    return item | {"images": images, "video": video}


# ---------------------------------------------------------------------------------------------------------------
# Calls of the teacher, and its answers on the disk


def teacher_calls(items, size):
    """Group the keys of {key: item} into calls with equal numbers of frames and images, long texts first.

    The calls depend only on the items. After a kill, or with another world size, every answer is therefore computed
    in the same batch and with the same rounding.
    """
    keys = list(items)
    numbers_of_media = [(len(item["video"]), len(item["images"])) for item in items.values()]
    lengths = [len(item["text"]) for item in items.values()]

    def most_first(n):
        frames, images = numbers_of_media[n]
        return -frames, -images, -lengths[n], n

    calls = []
    order = sorted(range(len(keys)), key=most_first)
    for _, group in itertools.groupby(order, key=lambda n: numbers_of_media[n]):
        alike = [keys[n] for n in group]
        calls += [alike[start : start + size] for start in range(0, len(alike), size)]
    return calls


def answer_call(ask, call, items, root):
    """Return {key: answer} of one call. If an image is unusable, its answer is {"error": sentence}."""
    usable = {}
    answers = {}
    for key in call:
        try:
            usable[key] = opened(items[key], root)
        except Skip as error:
            answers[key] = {"error": str(error)}
    if usable:
        answers |= zip(usable, ask(list(usable.values()), list(usable)))
    return answers


def find_answers(folder):
    """Return {key: (file, offset, whether it is an error)} of every complete line. A line that a kill has truncated
    counts as missing."""
    found = {}
    for path in sorted(Path(folder).glob("answers-*.jsonl")):
        with open(path, "rb") as file:
            start = 0
            for line in file:
                with contextlib.suppress(ValueError):  # truncated by a kill, or zeros after a crash
                    if line.endswith(b"\n"):
                        answer = json.loads(line)
                        found[answer["key"]] = path, start, "error" in answer
                start += len(line)
    return found


def usable_again(found, items, root):
    """Return the keys of errors with media that are readable now, because a disk may fail for a moment."""
    again = set()
    for key, (*_, is_error) in found.items():
        if is_error and key in items:
            with contextlib.suppress(Skip):
                opened(items[key], root)
                again.add(key)
    return again


def read_answer(path, start, _is_error):
    with open(path, "rb") as file:
        file.seek(start)
        return json.loads(file.readline())


# ---------------------------------------------------------------------------------------------------------------
# Filters: pure functions of one answer


def split_answer(text):
    """Return (reasoning, summary), or None if the form is wrong. The opening <think> may be in the teacher's prompt.
    <answer> may be missing or a box (GLM-4.1V and 4.5V). <gen_emb> or </answer> may close it."""
    text = re.sub(r"<\|(begin|end)_of_box\|>", "", text).strip()
    reasoning, closed, rest = text.removeprefix("<think>").partition("</think>")
    if not closed or not reasoning.strip():
        return None
    rest = rest.lstrip().removeprefix("<answer>")
    # Search backwards, because a search from the front takes quadratic time in a run of white space.
    closing = re.match(r"(?:\s|>bme_neg<|>rewsna/<)*", rest[::-1])
    summary = rest[: len(rest) - closing.end()]
    return reasoning.strip("\n"), summary.strip("\n")


def repeated_share(text, n=4, window=200):
    """Return the share of n-word sequences that repeat an earlier one: the maximum over the text and its windows.

    Ordinary reasoning is far below 0.2; a loop of a few sentences anywhere in the text is above 0.5. A short text may
    repeat a list, so fewer than 50 sequences count as 50.
    """
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|\w{1,20}|[^\w\s]", text.lower())  # Chinese by character
    shifted = [words[k:] for k in range(n)]
    sequences = list(zip(*shifted))
    step = window // 2
    parts = [sequences]
    for start in range(0, len(sequences) - step, step):
        parts.append(sequences[start : start + window])
    return max((len(part) - len(set(part))) / max(len(part), 50) for part in parts)


def judge(answer, max_tokens, max_repeat):
    """Return (reason to reject, None), or ("", (reasoning, summary)). The first reason counts."""
    if "error" in answer:
        return "media", None
    if not answer["ended"] or answer["tokens"] > max_tokens:  # without an end: cut off at --max_new_tokens
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


def filter_answers(pairs, folder, digests, args):
    """Write the pairs whose answers pass the filters to --out, as SFT rows. Next to the raw answers, write
    rejected.jsonl with the other pairs, and report.txt."""
    saved = find_answers(folder)
    counts = {}  # dataset -> Counter of "kept" and REASONS
    lengths = {side: Counter() for side in SIDES}  # bits of the number of tokens -> number of kept answers

    def kept_rows(rejected):
        for i, pair in enumerate(Progress(pairs, desc="filter", unit="pair")):
            answers, parts, reasons = {}, {}, {}
            for side in SIDES:
                answers[side] = read_answer(*saved[side_key(side, pair[side], digests)])
                reason, parts[side] = judge(answers[side], args.max_tokens, args.max_repeat)
                if reason:
                    reasons[side] = reason
            count = counts.setdefault(pair["dataset_name"], Counter())
            count[next(iter(reasons.values()), "kept")] += 1  # a pair counts once; the query's reason comes first
            if reasons:
                line = {"row": i, "dataset_name": pair["dataset_name"], "reasons": reasons,
                        "answers": {side: answers[side] for side in reasons}}  # fmt: skip
                rejected.write(json.dumps(line) + "\n")
                continue
            for side in SIDES:
                lengths[side][answers[side]["tokens"].bit_length()] += 1
            yield sft_row(pair, parts)

    with open(folder / "rejected.jsonl", "w", encoding="utf-8") as rejected:
        write_rows(args.out, kept_rows(rejected))
    report = filter_report(counts, lengths)
    (folder / "report.txt").write_text(report + "\n", encoding="utf-8")
    print(f"{report}\nwrote {args.out}; raw answers, rejected.jsonl and report.txt are in {folder}")


def filter_report(counts, lengths):
    """Return a text: the accepted share and reasons per dataset, and the lengths of the accepted answers."""
    total = sum(counts.values(), Counter())
    rows = [["dataset", "pairs", "kept", *REASONS]]
    for name, count in [*sorted(counts.items()), ("all", total)]:
        n = sum(count.values())
        shares = [f"{count[outcome] / n:.1%}" for outcome in ("kept", *REASONS)]
        rows.append([name, f"{n:,}", *shares])
    lines = [text_table(rows)]
    for side, histogram in lengths.items():
        lines.append(f"\ntokens of the kept answers, {ROLES[side][0]}")
        for bits in range(min(histogram, default=0), max(histogram, default=-1) + 1):  # one bar for each power of two
            share = histogram[bits] / histogram.total()
            lines.append(f"{f'below {1 << bits:,}':>14}{share:7.1%} {'#' * round(50 * share)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# annotate


def annotate(args):
    """Ask the teacher for every distinct item, divided among the ranks, then filter the answers. A killed run resumes
    from the saved answers. If all answers exist, only the filters run again."""
    refuse_own_input(args)
    folder = Path(f"{args.out}.answers")
    if Path(args.out).exists() and not folder.is_dir():
        raise BadInput(f"--out {args.out} is a file that annotate has not written. Give another name")
    pairs = read_pairs(args.pairs)
    if not pairs:
        raise SystemExit(f"{', '.join(args.pairs)}: no rows. Give files with pairs")
    rank, world, device = start_processes()
    hold(folder)
    group = None
    if world > 1:  # long enough to wait for the slowest rank
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    check_model(args.teacher)
    own = is_own_family(args.teacher)
    asked = question_settings(args, own)
    same_on_all_ranks(asked | {"content of --pairs": stable_hash(*map(pair_content, pairs))}, group)
    refuse_other_answers(folder, asked)
    paths = {path for pair in pairs for side in SIDES for path in pair[side]["images"] + pair[side]["video"]}
    digests = hash_media(paths, args.media_root, group)
    refuse_most_missing(paths, digests, f"--media_root {args.media_root}", "The teacher was not asked. Give the folder "
                        "that the paths of --pairs start from")  # fmt: skip
    items = keys_of_sides(pairs, digests)
    barrier(group)  # all ranks have read the settings
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", asked)
    calls = teacher_calls(items, args.batch_size * (OWN_CALL if own else 1))
    found = find_answers(folder)
    again = gather_objects(usable_again(found, items, args.media_root), group)[0]
    done = found.keys() - again
    todo = [call for call in calls if not done.issuperset(call)]
    barrier(group)  # all ranks have read the answers before one rank writes, so they agree on the calls left

    if todo[rank::world]:
        make_teacher = own_teacher if own else foreign_teacher
        ask_teacher(make_teacher(args, device), todo, items, folder, args.media_root)
    barrier(group)
    if rank == 0:
        filter_answers(pairs, folder, digests, args)
    barrier(group)
    end_processes()


def question_settings(args, own):
    """Return the settings that determine the answers. The teacher counts by the content of its files. For a foreign
    teacher this includes the files that its processor and generate() read."""
    settings = {key: getattr(args, key) for key in ("max_new_tokens", "temperature", "seed")}
    more = () if own else ("*.json", "*.jinja", "*.py")
    return settings | {"content of --teacher": weights_digest(args.teacher, more), "ask": ASK}


def refuse_other_answers(folder, asked):
    """Raise SystemExit if the folder holds answers to other questions or of another teacher."""
    if not any(path.stat().st_size for path in folder.glob("answers-*.jsonl")):
        return
    before = read_json(folder / "settings.json")
    if changed := changes(before, asked):
        reasons = "; ".join(changed.values())
        raise SystemExit(f"{folder} holds answers to other settings ({reasons}). Give another --out")


def is_own_family(teacher):
    try:
        return AutoConfig.from_pretrained(teacher).model_type in FAMILIES
    except (OSError, ValueError) as error:
        raise BadInput(f"--teacher {teacher}: cannot be loaded ({str(error).splitlines()[0]})") from error


def ask_teacher(ask, todo, items, folder, root):
    """Ask this rank's share of the calls, and write the answers of each call to the disk at once."""
    rank, world = processes()
    waiting = sum(map(len, todo))
    bar = Progress(total=len(items), initial=len(items) - waiting, desc="annotate", unit="side", disable=rank > 0,
                   smoothing=0.1)  # fmt: skip
    with open(folder / f"answers-{time.time_ns()}-{rank}.jsonl", "x", encoding="utf-8") as file:
        for start in range(0, len(todo) - rank, world):
            call = todo[start + rank]
            answers = answer_call(ask, call, items, root)
            for key in call:
                file.write(json.dumps({"key": key, **answers[key]}) + "\n")
            file.flush()
            bar.update(sum(map(len, todo[start : start + world])))  # rank 0 counts the calls of all ranks
    bar.close()


# ---------------------------------------------------------------------------------------------------------------
# The RL subset


def rl_subset(args):
    """Write a balanced sample of the pairs in --pairs that are not in --sft."""
    refuse_own_input(args)
    try:
        re.compile(args.visdoc)
    except re.error as error:
        raise BadInput(f"--visdoc {args.visdoc}: not a valid regular expression ({error}). Fix it") from error
    pairs = read_pairs(args.pairs)
    excluded = {pair_content(pair) for pair in read_pairs(args.sft)}
    seen = set(excluded)
    pools = {"image": {}, "video": {}, "visdoc": {}}  # modality -> {dataset: [pair]}, each content once
    for i in np.random.default_rng(args.seed).permutation(len(pairs)):
        pair = pairs[i]
        content = pair_content(pair)
        if content not in seen:
            seen.add(content)
            pools[modality_of(pair, args.visdoc)].setdefault(pair["dataset_name"], []).append(pair)
    chosen = draw_in_turns(pools, args.size)
    write_rows(args.out, map(rl_row, chosen))

    counts = Counter((modality_of(pair, args.visdoc), pair["dataset_name"]) for pair in chosen)
    for (modality, name), n in sorted(counts.items()):
        print(f"{modality:8}{name:32}{n:7,}")
    print(f"{len(chosen):,} of {len(pairs):,} pairs, none of the {len(excluded):,} of --sft; wrote {args.out}")


def pair_content(pair):
    return content_key(**pair["qry"]), content_key(**pair["pos"])


def modality_of(pair, visdoc):
    """Return a pair's modality. visdoc: a regular expression, because only dataset names identify visual documents."""
    if re.search(visdoc, pair["dataset_name"], re.IGNORECASE):
        return "visdoc"
    if pair["qry"]["video"] or pair["pos"]["video"]:
        return "video"
    return "image"


def draw_in_turns(pools, size):
    """Draw pairs from the modalities in turn, and in each one from its datasets in turn, until all are empty.

    pools: {modality: {dataset: [pair]}}. The pairs are taken from the ends of these lists.
    """
    turns = [deque(pool[name] for name in sorted(pool)) for pool in pools.values()]
    chosen = []
    while len(chosen) < size and any(turns):
        for datasets in turns:
            if datasets:
                chosen.append(datasets[0].pop())
                if datasets[0]:
                    datasets.rotate(-1)
                else:
                    datasets.popleft()
    return chosen[:size]


# ---------------------------------------------------------------------------------------------------------------
# Command line


def annotate_flags(p):
    p.add_argument("--pairs", nargs="+", required=True, help="files of pairs: .json, .jsonl or .parquet (docs/data.md)")
    p.add_argument("--media_root", default=".", help="folder that the media paths start from")
    p.add_argument("--teacher", required=True, help="folder or hub id of an image-text-to-text model")
    p.add_argument("--out", required=True, help="SFT file; raw answers are saved in OUT.answers/")
    p.add_argument("--batch_size", type=int, default=16, help="answers generated at once by each rank")
    p.add_argument("--max_new_tokens", type=int, default=8192, help="longest answer; longer ones are cut off")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--seed", type=int, default=0, help="random seed of the samples, if --temperature is above 0")
    p.add_argument("--max_tokens", type=int, default=8192, help="filter: longer answers are rejected (paper: 8192)")
    p.add_argument("--max_repeat", type=float, default=0.3, help="filter: largest share of repeated 4-word sequences")


def rl_subset_flags(p):
    p.add_argument("--pairs", nargs="+", required=True, help="files of pairs, as for annotate")
    p.add_argument("--sft", nargs="*", default=[], help="SFT files; their pairs are left out")
    p.add_argument("--out", required=True, help="RL file")
    p.add_argument("--size", type=int, default=11_000, help="number of pairs (the paper has about 11,000)")
    p.add_argument("--visdoc", default=r"colpali|visrag|vidore|visdoc|\bdoc\b",
                   help="regular expression of the names of datasets with visual documents")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="random seed of the sample")


def refuse_own_input(args):
    """Raise SystemExit if --out is one of the input files."""
    if any(Path(file).resolve() == Path(args.out).resolve() for file in [*args.pairs, *getattr(args, "sft", [])]):
        raise SystemExit(f"--out {args.out} is one of the files of --pairs or --sft. Give another name")


ANNOTATE = Command("annotate", "annotate bare pairs with a teacher and write SFT rows", annotate_flags, annotate)
RL_SUBSET = Command("rl-subset", "write a balanced RL file of pairs that SFT does not use", rl_subset_flags, rl_subset)
