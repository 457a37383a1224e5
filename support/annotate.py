"""The paper's data (commands of data.py): a teacher annotates pairs with reasoning and summaries, filters drop bad
rows, and the RL subset is drawn from the pairs that are left.

    bare pairs -> read_pairs -> a teacher's answers (kept on disk) -> judge -> SFT rows

A pair is {"dataset_name", "qry": item, "pos": item}, an item {"text", "images": [path], "video": [frame path]}. A side
is one of the two names; its key, side_key(), is its role and its content (text and bytes of the media), so a side that
many pairs share is asked for once.
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
from support.images import hash_media, open_picture, thinned
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
FRAME_SIDE = 448  # a foreign teacher sees a video as pictures no larger than this: 256 tokens each for most
OWN_CALL = 8  # batches in one call of our decode loop, which refills the slots of ended answers
ANY_MARK = f"{IMAGE_MARK}|{VIDEO_MARK}"
STRAY = re.compile(r"<\|[^<>|]*\|>|</?(?:think|answer|s|pad|eos|image|video)>|<(?:gen|disc)_emb>|\[/?INST\]")


# ---------------------------------------------------------------------------------------------------------------
# Bare pairs


def read_pairs(files):
    """Files of pairs -> list of pairs, reasoning left out. Four formats:

    {"dataset_name", "qry": {"text", "images": [path], "video": [frame path]}, "pos": {...}} (all but one key of a side
    optional); RL rows; SFT rows; MMEB-train's parquet (its dataset is named by the folder).
    """
    pairs = []
    for file in files:
        folder_name = ""
        if Path(file).suffix == ".parquet":
            folder_name = Path(file).resolve().parent.name
        for i, row in enumerate(rows_of_file(file)):
            pair = bare_pair(row, f"{file}, row {i}")
            pair["dataset_name"] = pair["dataset_name"] or folder_name
            pairs.append(pair)
    return pairs


def rows_of_file(file):
    """Yields the rows one by one: the reasoning, which is left out, has gigabytes."""
    if Path(file).suffix == ".parquet":
        yield from read_parquet(file)
    else:
        for _, _, row in scan_rows(file):
            yield row


def bare_pair(row, name):
    if isinstance(row.get("qry"), dict):
        check_keys(row, "a pair", name)
    elif "qry_image_path" in row:
        check_keys(row, "a row of MMEB-train", name)
    sides = {side: bare_side(row, side, f"{name}, {side}") for side in SIDES}
    return {"dataset_name": dataset_of(row), **sides}


def bare_side(row, side, name):
    """One side of a row in any of read_pairs' formats -> item: media paths, and the text without marks."""
    item = given_side(row, side, name)
    text = re.sub(r"<\|image_\d+\|>", "", without_marks(item)).strip()
    images = [path for path in item["images"] if not is_stand_in(path)]
    video = item["video"]
    if not (text or images or video):
        raise BadInput(f"{name}: neither text nor media; fill the side or take the row out")
    if images and video:
        raise BadInput(f"{name}: has both an image and a video; SFT files allow one of them")
    check_text(text, name)
    return {"text": text, "images": images, "video": video}


def given_side(row, side, name):
    """One side of a row as the item that it holds. Of an SFT row only what comes before <disc_emb>."""
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
    """Role, text and the bytes of the media; a file that is not there counts as its path, until it is there."""
    images = [digests[path] or path for path in item["images"]]
    video = [digests[path] or path for path in item["video"]]
    return f"{side} {content_key(item['text'], images, video)}"


def keys_of_sides(pairs, digests):
    """-> {key: item} of all sides, each content once, in the order of the pairs."""
    items = {}
    for pair in pairs:
        for side in SIDES:
            items[side_key(side, pair[side], digests)] = pair[side]
    return items


def digests_of_media(pairs, root, group=None):
    """{path: hash of its content} of all media. Raises BadInput if most of the files do not exist."""
    paths = {path for pair in pairs for side in SIDES for path in pair[side]["images"] + pair[side]["video"]}
    digests = hash_media(paths, root, group)
    absent = [path for path in digests if not digests[path]]
    if len(absent) > len(digests) / 2:
        raise BadInput(f"--media_root {root}: {len(absent)} of {len(digests)} media files of --pairs do not exist "
                       f"there, e.g. {absent[0]}. Nothing was asked. Give the folder that the paths start "
                       "from.")  # fmt: skip
    return digests


# ---------------------------------------------------------------------------------------------------------------
# Teachers: functions (items with opened pictures, their keys) -> [{"text", "tokens", "ended"}] in this order


def own_teacher(args, device):
    """A model of our families, read by our decode loop: one with the embedding tokens speaks our format, others are
    asked for it."""
    ours = GEN in AutoTokenizer.from_pretrained(args.teacher).get_vocab()  # Embedder would add it
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
    """Any other image-text-to-text model of transformers, by its own processor and generate(); videos as pictures."""
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
        torch.manual_seed(stable_hash(args.seed, *keys))  # samples do not depend on the calls before
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
            n = next((i for i, token in enumerate(ids) if token in ends), len(ids))  # what follows is padding
            answers.append({"text": tokenizer.decode(ids[:n]), "tokens": n, "ended": n < len(ids)})
        return answers

    return ask


def load_processor(teacher):
    try:
        processor = AutoProcessor.from_pretrained(teacher)
    except ImportError as error:  # of the video part of most processors
        cure = "pip install torchvision" if "orchvision" in str(error) else str(error).strip()
        raise SystemExit(f"--teacher {teacher}: its processor needs another package: {cure}") from error
    if not hasattr(processor, "image_processor") or not processor.chat_template:
        raise SystemExit(f"--teacher {teacher}: has no picture processor or no chat template")
    return processor


def conversation(item, key):
    """One side as the user's turn in transformers' form; the frames of a video become smaller pictures."""
    for frame in item["video"]:
        frame.thumbnail((FRAME_SIDE, FRAME_SIDE))
    content = [{"type": "image", "image": picture} for picture in item["images"] + item["video"]]
    text = question(item, key)
    if item["video"]:
        text = f"The pictures are frames of one video, in order.\n{text}"
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


def question(item, key):
    """The text that a teacher is asked, below the side's media."""
    side = key.split()[0]
    role, what = ROLES[side]
    return f"{item['text']}\n\n{ASK.format(role=role, what=what)}"


def opened(item, root):
    """The item with its pictures opened, a video thinned out. Raises Skip where one cannot be used."""
    mark = re.search(ANY_MARK, item["text"])
    if mark:
        raise Skip(f"the text holds a literal {mark[0]}, which an SFT row would take for the mark of a picture")
    images = [open_picture(path, root) for path in item["images"]]
    video = [open_picture(path, root, is_frame=True) for path in thinned(item["video"])]
    return item | {"images": images, "video": video}


# ---------------------------------------------------------------------------------------------------------------
# Calls of the teacher, and its answers on the disk


def teacher_calls(items, size):
    """{key: item} -> which keys are asked together: same numbers of frames and pictures, long texts first.

    A function of the items only: whatever was killed in between and however many processes share the calls, every
    answer is computed beside the same others, so that rounding is the same too.
    """
    keys = list(items)
    numbers_of_media = [(len(item["video"]), len(item["images"])) for item in items.values()]
    lengths = [len(item["text"]) for item in items.values()]

    def most_first(n):
        frames, pictures = numbers_of_media[n]
        return -frames, -pictures, -lengths[n], n

    calls = []
    order = sorted(range(len(keys)), key=most_first)
    for _, group in itertools.groupby(order, key=lambda n: numbers_of_media[n]):
        alike = [keys[n] for n in group]
        calls += [alike[start : start + size] for start in range(0, len(alike), size)]
    return calls


def answer_call(ask, call, items, root):
    """-> {key: answer} of one call; {"error": sentence} in the place of an answer where a picture cannot be used."""
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
    """key -> (file, offset, whether it is an error) of every complete line; a last line that a kill has torn counts as
    missing."""
    found = {}
    for path in sorted(Path(folder).glob("answers-*.jsonl")):
        with open(path, "rb") as file:
            start = 0
            for line in file:
                with contextlib.suppress(ValueError):  # torn by a kill, or the zeros of a crash
                    if line.endswith(b"\n"):
                        answer = json.loads(line)
                        found[answer["key"]] = path, start, "error" in answer
                start += len(line)
    return found


def usable_again(found, items, root):
    """Return the keys whose answer is an error, although their media can be read now: a disk may fail for a moment."""
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


def too_long(answer, bound):
    return not answer["ended"] or answer["tokens"] > bound  # not ended: cut off at --max_new_tokens


def split_answer(text):
    """(reasoning, summary), or None where the form is wrong. The opening <think> may stand in the teacher's prompt,
    <answer> may be missing or a box (GLM-4.1V and 4.5V), <gen_emb> or </answer> may close it."""
    text = re.sub(r"<\|(begin|end)_of_box\|>", "", text).strip()
    reasoning, closed, rest = text.removeprefix("<think>").partition("</think>")
    if not closed or not reasoning.strip():
        return None
    rest = rest.lstrip().removeprefix("<answer>")
    # Read backwards, because a search for the end from the front takes quadratic time in a run of white space.
    closing = re.match(r"(?:\s|>bme_neg<|>rewsna/<)*", rest[::-1])
    summary = rest[: len(rest) - closing.end()]
    return reasoning.strip("\n"), summary.strip("\n")


def repeated_share(text, n=4, window=200):
    """Share of a text's n-word sequences that occurred before in it: the worst of the whole and of its windows.

    Ordinary reasoning is far below 0.2; a loop of a few sentences, anywhere in it, above 0.5. A short text may say a
    list twice: fewer than 50 sequences count as 50.
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


class Filter:
    """The filters over all pairs: counts, and the pairs that pass as SFT rows."""

    def __init__(self, answers, digests, max_tokens, max_repeat):
        self.answers = answers  # key -> (file, offset)
        self.digests = digests  # of the media, for the keys
        self.max_tokens = max_tokens
        self.max_repeat = max_repeat
        self.counts = {}  # dataset -> Counter of "kept" and REASONS
        self.lengths = {side: Counter() for side in SIDES}  # bits of the number of tokens -> how many kept answers

    def kept_rows(self, pairs, rejected):
        """Yields the SFT rows of the pairs that pass; the others become lines of `rejected`, an open file."""
        for i, pair in enumerate(Progress(pairs, desc="filter", unit="pair")):
            parts = {}
            reasons = {}
            rejected_answers = {}
            lengths = {}
            for side in SIDES:
                answer = read_answer(*self.answers[side_key(side, pair[side], self.digests)])
                reason, parts[side] = judge(answer, self.max_tokens, self.max_repeat)
                lengths[side] = answer.get("tokens", 0)
                if reason:
                    reasons[side] = reason
                    rejected_answers[side] = answer
            count = self.counts.setdefault(pair["dataset_name"], Counter())
            count[next(iter(reasons.values()), "kept")] += 1  # a pair counts once, the query's reason first
            if reasons:
                line = {"row": i, "dataset_name": pair["dataset_name"], "reasons": reasons,
                        "answers": rejected_answers}  # fmt: skip
                rejected.write(json.dumps(line) + "\n")
                continue
            for side in SIDES:
                self.lengths[side][lengths[side].bit_length()] += 1
            yield sft_row(pair, parts)


def filter_answers(pairs, folder, digests, args):
    """Writes --out and, beside the raw answers, rejected.jsonl and report.txt."""
    passed = Filter(find_answers(folder), digests, args.max_tokens, args.max_repeat)
    with open(folder / "rejected.jsonl", "w", encoding="utf-8") as rejected:
        write_rows(args.out, passed.kept_rows(pairs, rejected))
    report = filter_report(passed.counts, passed.lengths)
    (folder / "report.txt").write_text(report + "\n", encoding="utf-8")
    print(f"{report}\nwrote {args.out}; raw answers, rejected.jsonl and report.txt are in {folder}")


def filter_report(counts, lengths):
    """Kept share and reasons per dataset, and how long the kept answers are, as text."""
    total = sum(counts.values(), Counter())
    rows = [["dataset", "pairs", "kept", *REASONS]]
    for name, count in [*sorted(counts.items()), ("all", total)]:
        n = sum(count.values())
        shares = [f"{count[outcome] / n:.1%}" for outcome in ("kept", *REASONS)]
        rows.append([name, f"{n:,}", *shares])
    lines = [text_table(rows)]
    for side, histogram in lengths.items():
        lines.append(f"\ntokens of the kept answers, {ROLES[side][0]}")
        lines += histogram_lines(histogram)
    return "\n".join(lines)


def histogram_lines(histogram):
    """histogram: bits of a number -> how often, as a bar of its share for every power of two."""
    lines = []
    for bits in range(min(histogram, default=0), max(histogram, default=-1) + 1):
        share = histogram[bits] / histogram.total()
        lines.append(f"{f'below {1 << bits:,}':>14}{share:7.1%} {'#' * round(50 * share)}")
    return lines


# ---------------------------------------------------------------------------------------------------------------
# annotate


def annotate(args):
    """Asks the teacher for every distinct side, shared out over the processes, then filters. A killed run goes on
    where it was; with all answers there, only the filters run (again)."""
    refuse_own_input(args)
    folder = Path(f"{args.out}.answers")
    if Path(args.out).exists() and not folder.is_dir():
        raise BadInput(f"--out {args.out} is a file that annotate has not made; give another name")
    pairs = read_pairs(args.pairs)
    if not pairs:
        raise SystemExit(f"{', '.join(args.pairs)}: no rows")
    rank, world, device = start_processes()
    hold(folder)
    group = None
    if world > 1:  # waits for the slowest
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    check_model(args.teacher)
    own = is_own_family(args.teacher)
    asked = question_settings(args, own)
    same_on_all_ranks(asked | {"content of --pairs": stable_hash(*map(pair_content, pairs))}, group)
    refuse_other_answers(folder, asked)
    digests = digests_of_media(pairs, args.media_root, group)
    items = keys_of_sides(pairs, digests)
    barrier(group)  # all have read the settings
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", asked)
    calls = teacher_calls(items, args.batch_size * (OWN_CALL if own else 1))
    found = find_answers(folder)
    again = gather_objects(usable_again(found, items, args.media_root), group)[0]
    todo = unanswered(calls, found.keys() - again)
    barrier(group)  # all have read the answers' files before one writes: they agree on what is left to do

    if todo[rank::world]:
        make_teacher = own_teacher if own else foreign_teacher
        ask_teacher(make_teacher(args, device), todo, items, folder, args.media_root)
    barrier(group)
    if rank == 0:
        filter_answers(pairs, folder, digests, args)
    barrier(group)
    end_processes()


def question_settings(args, own):
    """What decides the answers. The content of the teacher's files counts, not its path; of a foreign one also what its
    processor and generate() read."""
    settings = {key: getattr(args, key) for key in ("max_new_tokens", "temperature", "seed")}
    more = () if own else ("*.json", "*.jinja", "*.py")
    return settings | {"content of --teacher": weights_digest(args.teacher, more), "ask": ASK}


def refuse_other_answers(folder, asked):
    """Stops where the folder holds answers to other questions or of another teacher."""
    if not any(path.stat().st_size for path in folder.glob("answers-*.jsonl")):
        return
    before = read_json(folder / "settings.json")
    if changed := changes(before, asked):
        told = "; ".join(changed.values())
        raise SystemExit(f"{folder} holds answers to other settings ({told}); give another --out")


def is_own_family(teacher):
    try:
        return AutoConfig.from_pretrained(teacher).model_type in FAMILIES
    except (OSError, ValueError) as error:
        raise BadInput(f"--teacher {teacher}: cannot be loaded ({str(error).splitlines()[0]})") from error


def unanswered(calls, found):
    """The calls of which an answer is missing."""
    return [call for call in calls if any(key not in found for key in call)]


def ask_teacher(ask, todo, items, folder, root):
    """This process's share of the calls, each written to the disk as soon as it is answered."""
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
            bar.update(sum(map(len, todo[start : start + world])))  # process 0 speaks for all
    bar.close()


# ---------------------------------------------------------------------------------------------------------------
# The RL subset


def rl_subset(args):
    """A balanced draw from --pairs without what --sft holds."""
    refuse_own_input(args)
    try:
        re.compile(args.visdoc)
    except re.error as error:
        raise BadInput(f"--visdoc {args.visdoc}: no regular expression ({error})") from error
    pairs = read_pairs(args.pairs)
    excluded = {pair_content(pair) for pair in read_pairs(args.sft)}
    order = np.random.default_rng(args.seed).permutation(len(pairs))
    unseen = distinct_pairs([pairs[i] for i in order], excluded)
    pools = {"image": {}, "video": {}, "visdoc": {}}
    for pair in unseen:
        pool = pools[modality_of(pair, args.visdoc)]
        pool.setdefault(pair["dataset_name"], []).append(pair)
    chosen = draw_in_turns(pools, args.size)
    write_rows(args.out, map(rl_row, chosen))

    counts = Counter((modality_of(pair, args.visdoc), pair["dataset_name"]) for pair in chosen)
    for (modality, name), n in sorted(counts.items()):
        print(f"{modality:8}{name:32}{n:7,}")
    print(f"{len(chosen):,} of {len(pairs):,} pairs, none of the {len(excluded):,} of --sft; wrote {args.out}")


def pair_content(pair):
    return content_key(**pair["qry"]), content_key(**pair["pos"])


def modality_of(pair, visdoc):
    """visdoc: regular expression of the datasets of visual documents, which nothing else tells from pictures."""
    if re.search(visdoc, pair["dataset_name"], re.IGNORECASE):
        return "visdoc"
    if pair["qry"]["video"] or pair["pos"]["video"]:
        return "video"
    return "image"


def distinct_pairs(pairs, excluded):
    """Each content once, without the excluded ones."""
    seen = set(excluded)
    distinct = []
    for pair in pairs:
        content = pair_content(pair)
        if content not in seen:
            seen.add(content)
            distinct.append(pair)
    return distinct


def draw_in_turns(pools, size):
    """One pair of each modality in turn, in it one of each dataset in turn; where one runs out the others fill up.

    pools: modality -> {dataset: [pair]}, from whose ends the pairs are taken.
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
    p.add_argument("--out", required=True, help="SFT file; raw answers go to OUT.answers/")
    p.add_argument("--batch_size", type=int, default=16, help="answers written at once by each process")
    p.add_argument("--max_new_tokens", type=int, default=8192, help="an answer is cut off here")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--seed", type=int, default=0, help="of the samples, where --temperature is above 0")
    p.add_argument("--max_tokens", type=int, default=8192, help="filter: longer answers are rejected (paper: 8192)")
    p.add_argument("--max_repeat", type=float, default=0.3, help="filter: largest share of repeated 4-word sequences")


def rl_subset_flags(p):
    p.add_argument("--pairs", nargs="+", required=True, help="files of pairs, as for annotate")
    p.add_argument("--sft", nargs="*", default=[], help="SFT files whose pairs are left out")
    p.add_argument("--out", required=True, help="RL file")
    p.add_argument("--size", type=int, default=11_000, help="pairs (the paper has about 11,000)")
    p.add_argument("--visdoc", default=r"colpali|visrag|vidore|visdoc|\bdoc\b",
                   help="datasets of visual documents; nothing in a row tells them from pictures")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of the draw")


def refuse_own_input(args):
    """Raises SystemExit if --out is one of the input files."""
    if any(Path(file).resolve() == Path(args.out).resolve() for file in [*args.pairs, *getattr(args, "sft", [])]):
        raise SystemExit(f"--out {args.out} is one of the files of --pairs or --sft; give another name")


ANNOTATE = Command("annotate", "bare pairs and a teacher -> SFT rows", annotate_flags, annotate)
RL_SUBSET = Command("rl-subset", "a balanced RL file out of pairs that SFT does not see", rl_subset_flags, rl_subset)
