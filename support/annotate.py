"""The paper's data (commands of data.py).

A teacher annotates pairs with reasoning and summaries, filters drop bad rows, and the RL subset is drawn from the pairs
that are left.

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
    ANY_MARK,
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
    changes,
    end_processes,
    hold,
    processes,
    read_json,
    stable_hash,
    start_processes,
    text_table,
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
OWN_CALL = 8  # batches in one call of our decode loop, which refills the slots of ended answers
BLANK_PATHS = ("blank.jpg", "images/blank.jpg")  # they say "no picture" in the published files
STRAY = re.compile(r"<\|[^<>|]*\|>|</?(?:think|answer|s|pad|eos|image|video)>|<(?:gen|disc)_emb>|\[/?INST\]")


def read_pairs(files):
    """Files of pairs -> list of {"dataset_name", "qry": input, "pos": input}, reasoning left out. Four formats:

    {"dataset_name", "qry": {"text", "images": [path], "video": [frame path]}, "pos": {...}} (all but one key of a side
    optional); RL rows; SFT rows; MMEB-train's parquet (its dataset is named by the folder). Raises BadInput.
    """
    pairs = []
    for file in files:
        if Path(file).suffix == ".parquet":
            folder = Path(file).resolve().parent.name
            rows = parquet_rows(file)
        else:
            folder = ""
            rows = (row for _, _, row in scan_rows(file))  # one by one: the reasoning left out has gigabytes
        for i, row in enumerate(rows):
            pair = bare_pair(row, f"{file}, row {i}")
            pair["dataset_name"] = pair["dataset_name"] or folder
            pairs.append(pair)
    return pairs


def parquet_rows(file):
    """Yields the rows as dicts. Raises BadInput where there is no such file or it is torn."""
    import pyarrow.parquet

    if not Path(file).is_file():
        raise MissingFile(f"{file}: no such file")
    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read as parquet ({error}); copy it again") from error
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def bare_pair(row, name):
    if isinstance(row.get("qry"), dict):
        check_keys(row, "a pair", name)
    elif "qry_image_path" in row:
        check_keys(row, "a row of MMEB-train", name)
    query = bare_side(row, "qry", f"{name}, qry")
    target = bare_side(row, "pos", f"{name}, pos")
    return {"dataset_name": dataset_of(row), "qry": query, "pos": target}


def bare_side(row, side, name):
    """One side of a pair in any of read_pairs' formats -> input dict: media paths, and the text without marks."""
    item = side_as_input(row, side, name)
    text = without_marks(item["text"], item["images"], item["video"])
    text = re.sub(r"<\|image_\d+\|>", "", text).strip()  # MMEB-train's marks
    images = [path for path in item["images"] if str(path) not in BLANK_PATHS]
    video = item["video"]
    if not (text or images or video):
        raise BadInput(f"{name}: neither text nor media; fill the side or take the row out")
    if images and video:
        raise BadInput(f"{name}: has both an image and a video; SFT files allow one of them")
    check_text(text, name)
    return {"text": text, "images": images, "video": video}


def side_as_input(row, side, name):
    """One side as it stands in the row -> input dict. Raises BadInput."""
    given = row.get(side)
    if isinstance(given, dict) and "conversations" in given:
        human, images, video, _ = sft_side(given, name)
        media_marks(human, images, video, name)
        text = human.split(DISC)[0]
        return {"text": re.sub(ANY_MARK, "", text), "images": images, "video": video}
    if isinstance(given, dict):
        return check_input(given, name)
    if f"{side}_image_path" in row:  # MMEB-train calls the query's text "qry", the target's "pos_text"
        text = given if side == "qry" else row.get("pos_text")
        return check_input({"text": text, "images": row[f"{side}_image_path"]}, name)
    return rl_side(row, side, name)


def side_key(side, item):
    """Under which a side's answer is kept: equal queries, or equal targets, are asked once."""
    return f"{side} {content_key(**item)}"


# ---------------------------------------------------------------------------------------------------------------
# Teachers: functions (inputs with opened pictures, their keys) -> [{"text", "tokens", "ended"}] in this order


def own_teacher(args, device):
    """A Qwen2-VL, read by our decode loop: one with the embedding tokens speaks our format, others are asked for it."""
    speaks_our_format = GEN in AutoTokenizer.from_pretrained(args.teacher).get_vocab()  # Embedder would add it
    embedder = Embedder.from_pretrained(args.teacher, device=device, dtype=teacher_dtype(device))

    def prompt_of(item, key):
        if speaks_our_format:
            row = encode_input(embedder.tokenizer, item, name=key, family=embedder.family)
        else:
            images = item["images"]
            video = item["video"]
            human = IMAGE_MARK * len(images) + VIDEO_MARK * bool(video) + question(item, key)
            row = encode(embedder.tokenizer, human, images, video, name=key, family=embedder.family)
        return Prompt(key, row, stable_hash(args.seed, key))

    def ask(items, keys):
        prompts = list(map(prompt_of, items, keys))
        answers = {}
        for prompt, rollouts in embedder.generate(
            prompts,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            slots=args.batch_size,
        ):
            ids = rollouts.ids[0]
            text = embedder.texts_of(rollouts)[0]
            ended = ids[-1] == embedder.end_id
            answers[prompt.key] = {"text": text, "tokens": len(ids), "ended": ended}
        return [answers[key] for key in keys]

    return ask


def teacher_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def foreign_teacher(args, device):
    """Any other image-text-to-text model of transformers, by its own processor and generate(); videos as pictures."""
    processor = load_processor(args.teacher)
    dtype = teacher_dtype(device)
    model = AutoModelForImageTextToText.from_pretrained(args.teacher, dtype=dtype).to(device).eval()
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    end_ids = np.atleast_1d(model.generation_config.eos_token_id).tolist()
    sampling = {"do_sample": False}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}

    def ask(items, keys):
        torch.manual_seed(stable_hash(args.seed, *keys))  # samples do not depend on the calls before
        inputs = processor.apply_chat_template(
            list(map(conversation, items, keys)),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(device, dtype=dtype)
        n_prompt = inputs["input_ids"].shape[1]
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, **sampling)
        return [decoded(ids, tokenizer, end_ids) for ids in out[:, n_prompt:].tolist()]

    return ask


def load_processor(teacher):
    """Raises SystemExit where the teacher's processor lacks a package, or cannot be asked about pictures."""
    try:
        processor = AutoProcessor.from_pretrained(teacher)
    except ImportError as error:  # of the video part of most processors
        cure = "pip install torchvision" if "orchvision" in str(error) else str(error).strip()
        raise SystemExit(f"--teacher {teacher}: its processor needs another package: {cure}") from error
    if not hasattr(processor, "image_processor") or not processor.chat_template:
        raise SystemExit(f"--teacher {teacher}: has no picture processor or no chat template")
    return processor


def conversation(item, key):
    """The input as the messages of a chat template. Shrinks the frames of its video."""
    for frame in item["video"]:
        frame.thumbnail((FRAME_SIDE, FRAME_SIDE))
    text = question(item, key)
    if item["video"]:
        text = "The pictures are frames of one video, in order.\n" + text
    content = [{"type": "image", "image": picture} for picture in item["images"] + item["video"]]
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


def decoded(ids, tokenizer, end_ids):
    """The answer in a row of generate(); after its end token is padding."""
    n = 0
    while n < len(ids) and ids[n] not in end_ids:
        n += 1
    return {"text": tokenizer.decode(ids[:n]), "tokens": n, "ended": n < len(ids)}


def question(item, key):
    """The text that a teacher is asked, below the side's media."""
    role, what = ROLES[key.split()[0]]
    return f"{item['text']}\n\n{ASK.format(role=role, what=what)}"


def opened(item, root):
    """The input with its pictures opened, a video thinned out. Raises Skip where one cannot be used."""
    if mark := re.search(ANY_MARK, item["text"]):
        raise Skip(f"the text holds a literal {mark[0]}, which an SFT row would take for the mark of a picture")
    images = [open_picture(path, root) for path in item["images"]]
    video = [open_picture(path, root) for path in thinned(item["video"])]
    return item | {"images": images, "video": video}


def teacher_calls(items, size):
    """Which inputs are asked together, as lists of numbers: same numbers of frames and pictures, long texts first.

    A function of the inputs only: whatever was killed in between and however many processes share the calls, every
    answer is computed beside the same others, so that rounding is the same too.
    """
    media = [(len(item["video"]), len(item["images"])) for item in items]

    def most_first(n):
        num_frames, num_images = media[n]
        return -num_frames, -num_images, -len(items[n]["text"]), n

    order = sorted(range(len(items)), key=most_first)
    calls = []
    for _, group in itertools.groupby(order, key=lambda n: media[n]):
        group = list(group)
        calls += [group[start : start + size] for start in range(0, len(group), size)]
    return calls


def find_answers(folder):
    """key -> (file, offset in bytes) of every complete line; a last line that a kill has torn is not there."""
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


def read_answer(path, start):
    with open(path, "rb") as file:
        file.seek(start)
        return json.loads(file.readline())


# ---------------------------------------------------------------------------------------------------------------
# Filters: pure functions of one answer


def too_long(answer, bound):
    return not answer["ended"] or answer["tokens"] > bound  # not ended: cut off at --max_new_tokens


def split_answer(text):
    """(reasoning, summary), or None where the form is wrong.

    The opening <think> may stand in the teacher's prompt, <answer> may be missing or a box (GLM-4.1V and 4.5V),
    <gen_emb> or </answer> may close it.
    """
    text = re.sub(r"<\|(begin|end)_of_box\|>", "", text).strip()
    form = r"(?:<think>)?(.*?)</think>\s*(?:<answer>)?(.*?)(?:<gen_emb>|</answer>|\s)*"
    match = re.fullmatch(form, text, re.DOTALL)
    if not match or not match[1].strip():
        return None
    return match[1].strip("\n"), match[2].strip("\n")


def repeated_share(text, n=4, window=200):
    """Share of a text's n-word sequences that occurred before in it: the worst of the whole and of its windows.

    Ordinary reasoning is far below 0.2; a loop of a few sentences, anywhere in it, above 0.5. A short text may say a
    list twice: fewer than 50 sequences count as 50.
    """
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|\w{1,20}|[^\w\s]", text.lower())  # Chinese by character
    shifted = [words[k:] for k in range(n)]
    sequences = list(zip(*shifted))
    parts = [sequences]
    step = window // 2
    for start in range(0, len(sequences) - step, step):
        parts.append(sequences[start : start + window])
    shares = []
    for part in parts:
        repeats = len(part) - len(set(part))
        shares.append(repeats / max(len(part), 50))
    return max(shares)


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


# ---------------------------------------------------------------------------------------------------------------
# Annotation


class AnswerFilter:
    """Judges the answers of pairs, one pair after the other, and counts what it finds."""

    def __init__(self, folder, args):
        self.found = find_answers(folder)
        self.max_tokens = args.max_tokens
        self.max_repeat = args.max_repeat
        self.counts = {}  # dataset -> how many pairs were kept or rejected, by reason
        self.lengths = {"qry": Counter(), "pos": Counter()}  # kept answers by the bits of their number of tokens

    def rows(self, pairs, rejected):
        """Yields the SFT rows of the pairs whose answers are both good, writes the others' reasons to a file."""
        for i, pair in enumerate(Progress(pairs, desc="filter", unit="pair")):
            dataset = pair["dataset_name"]
            answers = {side: self.answer(side, pair) for side in ("qry", "pos")}
            reasons = {}
            parts = {}
            for side, answer in answers.items():
                reason, parts[side] = judge(answer, self.max_tokens, self.max_repeat)
                if reason:
                    reasons[side] = reason
            first_reason = next(iter(reasons.values()), "kept")  # a pair counts once, the query's reason first
            self.counts.setdefault(dataset, Counter())[first_reason] += 1
            if reasons:
                line = {"row": i, "dataset_name": dataset, "reasons": reasons}
                rejected.write(json.dumps(line) + "\n")
                continue
            for side, answer in answers.items():
                self.lengths[side][answer["tokens"].bit_length()] += 1
            yield sft_row(pair, parts)

    def answer(self, side, pair):
        path, start = self.found[side_key(side, pair[side])]
        return read_answer(path, start)


def filter_answers(pairs, folder, args):
    """Writes --out and, beside the raw answers, rejected.jsonl and report.txt."""
    answer_filter = AnswerFilter(folder, args)
    with open(folder / "rejected.jsonl", "w", encoding="utf-8") as rejected:
        write_rows(args.out, answer_filter.rows(pairs, rejected))
    report = filter_report(answer_filter.counts, answer_filter.lengths)
    (folder / "report.txt").write_text(report + "\n", encoding="utf-8")
    print(f"{report}\nwrote {args.out}; raw answers, rejected.jsonl and report.txt are in {folder}")


def filter_report(counts, lengths):
    """Kept share and reasons per dataset, and how long the good answers are, as text."""
    total = sum(counts.values(), Counter())
    table = [["dataset", "pairs", "kept", *REASONS]]
    for name, count in [*sorted(counts.items()), ("all", total)]:
        n = sum(count.values())
        shares = [f"{count[outcome] / n:.1%}" for outcome in ("kept", *REASONS)]
        table.append([name, f"{n:,}", *shares])
    lines = [text_table(table)]
    for side, histogram in lengths.items():
        role, _ = ROLES[side]
        lines.append(f"\ntokens of the kept answers, {role}")
        lines += histogram_lines(histogram)
    return "\n".join(lines)


def histogram_lines(histogram):
    """histogram: number of answers by the bits of their number of tokens."""
    total = sum(histogram.values())
    shortest = min(histogram, default=0)
    longest = max(histogram, default=-1)
    lines = []
    for bits in range(shortest, longest + 1):
        share = histogram[bits] / total
        bound = f"below {1 << bits:,}"
        bar = "#" * round(50 * share)
        lines.append(f"{bound:>14}{share:7.1%} {bar}")
    return lines


def annotate(args):
    """Asks the teacher for every distinct side, shared out over the processes, then filters.

    A killed run goes on where it was; with all answers there, only the filters run (again).
    """
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

    settings = answer_settings(args)
    refuse_other_answers(folder, settings)
    barrier(group)  # all have read the settings
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)

    sides = distinct_sides(pairs)
    is_own = is_of_our_families(args.teacher)
    size = args.batch_size * OWN_CALL if is_own else args.batch_size
    calls = calls_left(sides, folder, size)
    barrier(group)  # all have read the answers before one writes: they agree on what is left to do
    if calls[rank::world]:
        make_teacher = own_teacher if is_own else foreign_teacher
        write_answers(make_teacher(args, device), sides, calls, folder, args.media_root)
    barrier(group)
    if rank == 0:
        filter_answers(pairs, folder, args)
    barrier(group)
    end_processes()


def answer_settings(args):
    """What the answers in a folder depend on."""
    weights = []  # another model may come under the same name
    for path in Path(args.teacher).glob("*.safe*"):
        about = path.stat()
        weights.append((path.name, about.st_size, about.st_mtime_ns))
    settings = {key: getattr(args, key) for key in ("teacher", "max_new_tokens", "temperature", "seed")}
    return settings | {"weights": stable_hash(*sorted(weights)), "ask": ASK}


def refuse_other_answers(folder, settings):
    """Raises SystemExit where the folder's answers were made with other settings."""
    path = folder / "settings.json"
    before = read_json(path) if path.exists() else settings
    if changed := changes(before, settings):
        told = "; ".join(changed.values())
        raise SystemExit(f"{folder} holds answers to other settings ({told}); give another --out")


def distinct_sides(pairs):
    """key -> input of every side that has to be asked."""
    sides = {}
    for pair in pairs:
        for side in ("qry", "pos"):
            key = side_key(side, pair[side])
            sides[key] = pair[side]
    return sides


def is_of_our_families(teacher):
    """Whether our decode loop can read the teacher. Raises BadInput where it cannot be loaded."""
    try:
        return AutoConfig.from_pretrained(teacher).model_type in FAMILIES
    except (OSError, ValueError) as error:
        raise BadInput(f"--teacher {teacher}: cannot be loaded ({str(error).splitlines()[0]})") from error


def calls_left(sides, folder, size):
    """The teacher's calls, as lists of keys, without those whose answers are all in the folder."""
    found = find_answers(folder)
    keys = list(sides)
    left = []
    for call in teacher_calls(list(sides.values()), size):
        call_keys = [keys[n] for n in call]
        if not all(key in found for key in call_keys):
            left.append(call_keys)
    return left


def write_answers(ask, sides, calls, folder, root):
    """This process's share of the calls, each written to its file in the folder as soon as it is answered."""
    rank, world = processes()
    num_left = sum(map(len, calls))
    bar = Progress(
        total=len(sides),
        initial=len(sides) - num_left,
        desc="annotate",
        unit="side",
        disable=rank > 0,
        smoothing=0.1,
    )
    with open(folder / f"answers-{time.time_ns()}-{rank}.jsonl", "x", encoding="utf-8") as file:
        for first in range(0, len(calls), world):
            together = calls[first : first + world]  # one call for each process
            if rank < len(together):
                answers = answers_of(together[rank], ask, sides, root)
                lines = [json.dumps({"key": key, **answer}) + "\n" for key, answer in answers.items()]
                file.write("".join(lines))
                file.flush()
            bar.update(sum(map(len, together)))  # process 0 speaks for all
    bar.close()


def answers_of(keys, ask, sides, root):
    """One call -> its answers by key, in the order of the keys; an error where the media cannot be used."""
    inputs = {}
    errors = {}
    for key in keys:
        try:
            inputs[key] = opened(sides[key], root)
        except Skip as error:
            errors[key] = {"error": str(error)}
    answers = dict(errors)
    if inputs:
        answers |= zip(inputs, ask(list(inputs.values()), list(inputs)))
    return {key: answers[key] for key in keys}


# ---------------------------------------------------------------------------------------------------------------
# The RL subset


def rl_subset(args):
    """A balanced draw from --pairs without what --sft holds."""
    try:
        re.compile(args.visdoc)
    except re.error as error:
        raise BadInput(f"--visdoc {args.visdoc}: no regular expression ({error})") from error
    pairs = read_pairs(args.pairs)
    in_sft = {pair_content(pair) for pair in read_pairs(args.sft)}
    shuffled = np.random.default_rng(args.seed).permutation(len(pairs))
    pools = pools_of([pairs[i] for i in shuffled], in_sft, args.visdoc)
    chosen = draw_in_turn(pools, args.size)
    write_rows(args.out, map(rl_row, chosen))
    counts = Counter((modality(pair, args.visdoc), pair["dataset_name"]) for pair in chosen)
    lines = [f"{kind:8}{name:32}{n:7,}" for (kind, name), n in sorted(counts.items())]
    print("\n".join(lines))
    print(f"{len(chosen):,} of {len(pairs):,} pairs, none of the {len(in_sft):,} of --sft; wrote {args.out}")


def pair_content(pair):
    """Identity of a pair: that of its sides."""
    return content_key(**pair["qry"]), content_key(**pair["pos"])


def modality(pair, visdoc):
    """visdoc: regular expression for the names of datasets of visual documents."""
    if re.search(visdoc, pair["dataset_name"], re.IGNORECASE):
        return "visdoc"
    if pair["qry"]["video"] or pair["pos"]["video"]:
        return "video"
    return "image"


def pools_of(pairs, in_sft, visdoc):
    """Pairs that SFT does not hold, each once: {modality: {dataset: [pair]}}."""
    pools = {"image": {}, "video": {}, "visdoc": {}}
    seen = set(in_sft)
    for pair in pairs:
        content = pair_content(pair)
        if content not in seen:
            seen.add(content)
            pool = pools[modality(pair, visdoc)]
            pool.setdefault(pair["dataset_name"], []).append(pair)
    return pools


def draw_in_turn(pools, size):
    """At most `size` pairs: one of each modality in turn, in it one of each dataset in turn, the last of its list.

    Where one runs out the others fill up. Empties the lists that it draws from.
    """
    queues = []  # of each modality, its datasets that have pairs left
    for pool in pools.values():
        queues.append(deque(pool[name] for name in sorted(pool)))
    chosen = []
    while len(chosen) < size and any(queues):
        for queue in filter(None, queues):
            dataset = queue.popleft()
            chosen.append(dataset.pop())
            if dataset:
                queue.append(dataset)
    return chosen[:size]
