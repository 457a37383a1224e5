"""The 78 published tasks of MMEB: read and check their files, compare scores with the published ones.

assets/mmeb_v2.json names for each task the repository of its annotations, the columns to read, the folders of its
media, the parser and the instructions. load_mmeb() follows it:

    ROOT/annotations/REPO  ->  annotation_files()  ->  read_table()  ->  parse_row(), or visdoc_rows()  ->  a task

An input is {"text", "images": [path], "video": [frame path]}.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import metadata_load

from support.files import check_columns, one_or_more, read_parquet, read_rows, write_file
from support.formats import check_text
from support.images import NUM_FRAMES, open_image, thinned
from support.program import BadInput, MissingFile, Progress, Skip, text_table

ASSET = json.loads((Path(__file__).parent.parent / "assets" / "mmeb_v2.json").read_text(encoding="utf-8"))
MMEB = {task["name"]: task for task in ASSET["tasks"]}  # the 78 tasks as data, in the order of the published tables
GRADED = ("ViDoRe_esg_reports_human_labeled_v2", "ViDoSeek-doc", "MMLongBench-doc")  # labels of different grades

# --------------------------------------------------------------------------------------------------------------
# From the published files to the fields of a task


class Candidates(NamedTuple):
    keys: list[str | int]
    build: Callable  # index in keys -> the input; only called for a new key, because rows repeat lists of a thousand


class ParsedRow(NamedTuple):
    query: dict  # an input
    candidates: Candidates
    labels: str | int | list  # the key or keys of the right candidates
    grades: list | None = None  # one per label; None: all are equally right


def load_mmeb(name, root, vidore_instruction=True):
    """Return the fields of one of the 78 tasks, as in eval.py's Task.

    The candidates are in the order in which their keys first appear: those of the rows, then those of the corpus. A key
    has the content of its first appearance.
    """
    about = MMEB[name]
    folder = root / "annotations" / about["repo"]
    folders = [root / media for media in about["media"]]
    media = next((path for path in folders if path.is_dir()), folders[0])
    if about["modality"] == "visdoc":
        parsed, corpus = visdoc_rows(about, folder, media, vidore_instruction)
    else:
        parsed = parsed_rows(about, folder, media, root)
        corpus = texts_as_candidates(about.get("labels", []))

    queries = []
    pool = {}
    for row in parsed:
        add_candidates(pool, row.candidates)
        listed = None
        if about["eval_type"] == "local":  # interned: a thousand names per query repeat
            listed = [sys.intern(key) for key in row.candidates.keys]
        queries.append({"input": row.query, "labels": one_or_more(row.labels), "grades": row.grades,
                        "candidates": listed})  # fmt: skip
    add_candidates(pool, corpus)

    if not queries:
        raise BadInput(f"{folder}: no rows for {name}")
    for i, query in enumerate(queries):  # a text that cannot be encoded raises now, not after hours of embedding
        check_text(query["input"]["text"], f"{folder}, query {i} of {name}")
    for key, item in pool.items():
        check_text(item["text"], f"{folder}, candidate {key!r} of {name}")
    fields = {key: about[key] for key in ("name", "modality", "group", "eval_type", "main_metric")}
    return fields | {"queries": queries, "candidates": pool}


def parsed_rows(about, folder, media, root):
    """Yield the ParsedRow of every row of an image or video task."""
    rows = []
    for config in about["configs"]:
        for path in annotation_files(folder, config, about["split"]):
            rows += [row | {"subset": config} for row in read_table(path, about["columns"])]
    for i, row in enumerate(rows[: about.get("first_rows")]):
        yield parse_row(about, row, media, root, f"{folder}, row {i} of {about['name']}")


def add_candidates(pool, candidates):
    for i, key in enumerate(candidates.keys):
        if key not in pool:
            pool[key] = candidates.build(i)


# --------------------------------------------------------------------------------------------------------------
# Annotation files

HOW_TO_GET = "; how to get them: python eval.py --check --root ROOT --tasks NAME"


def annotation_files(folder, config, split):
    """Return the files of one config and split: those of the dataset card, or those with matching names."""
    files = files_of_card(folder, config, split) or files_by_name(folder, config, split)
    if not files:
        raise MissingFile(f"{folder} has no files of config {config or 'default'}, split {split}{HOW_TO_GET}")
    refuse_missing_shards(files)
    return files


# NAME-00000-of-00002.parquet; older ones have a hash, and a browser adds " (1)" to a second download
SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?(?: \(\d+\))?(\.\w+)")


def refuse_missing_shards(files):
    """Raise BadInput if a shard of a table is missing or there twice: with other candidates the scores would differ."""
    shards = {}  # (folder, NAME, ending) -> [(N, index)] of its NAME-index-of-N
    for path in files:
        if found := SHARD.fullmatch(path.name):
            name, index, total, ending = found.groups()
            shards.setdefault((path.parent, name, ending), []).append((int(total), int(index)))
    for (folder, name, ending), found in shards.items():
        n = found[0][0]
        first = int((n, n) in found)  # some tools count from 1
        expected = {(n, index) for index in range(first, first + n)}
        if len(set(found)) < len(found) or set(found) - expected:
            totals = ", ".join(f"{total:05}" for total in sorted({total for total, _ in found}))
            raise BadInput(f"{folder} holds files {name}-*{ending} of several downloads (of {totals}), and rows "
                           "would be read twice. Delete the older files")  # fmt: skip
        if absent := sorted(expected - set(found)):
            example = f"{name}-{absent[0][1]:05}-of-{n:05}{ending}"
            raise MissingFile(f"{folder}: {len(absent)} of {n} files {name}-* are missing, e.g. {example}{HOW_TO_GET}")


def files_of_card(folder, config, split):
    card = None
    if (folder / "README.md").is_file():
        card = metadata_load(folder / "README.md")
    configs = {entry.get("config_name"): entry.get("data_files") for entry in (card or {}).get("configs", [])}
    parts = configs.get(config or "default")
    if not config and len(configs) == 1:  # a single config is the default, under any name
        parts = next(iter(configs.values()))
    of_split = [part for part in parts or [] if isinstance(part, dict) and part["split"] == split]
    patterns = [pattern for part in of_split for pattern in one_or_more(part["path"])]
    found = {pattern: sorted(folder.glob(pattern)) for pattern in patterns}
    files = [path for paths in found.values() for path in paths]
    absent = [pattern for pattern, paths in found.items() if not paths]
    if files and absent:
        raise MissingFile(f"{folder} has no file {absent[0]}, which its README.md names for split {split}{HOW_TO_GET}")
    return list(dict.fromkeys(files))  # two patterns may match one file


def files_by_name(folder, config, split):
    files = []
    for path in sorted(folder.rglob("*")):
        folders_and_name = path.relative_to(folder).parts
        of_config = config is None or config in folders_and_name or path.stem.endswith(config)
        of_split = split in path.stem or path.stem.endswith(str(config))
        is_table = path.suffix in (".parquet", ".json", ".jsonl") and not path.name.startswith(".")
        if of_config and of_split and is_table:
            files.append(path)
    return files


def read_table(path, columns):
    """Return the rows of a parquet, json or jsonl file as dicts."""
    if path.suffix == ".parquet":
        return list(read_parquet(path, columns))
    rows = read_rows(path)
    if rows:
        check_columns(path, columns, set.intersection(*map(set, rows)))
    return rows


# --------------------------------------------------------------------------------------------------------------
# Inputs and candidates


def mmeb_input(text, images=(), video=()):
    """Return an input. UME-R1 puts the media first, strips the text and drops the published media marks."""
    text = re.sub(r"<\|(image_1|image_pad|video_pad)\|>", "", text)
    return {"text": text.strip(), "images": [str(path) for path in images], "video": list(video)}


def clip_input(folder, text, n=NUM_FRAMES):
    return mmeb_input(text, video=sample_frames(folder, n))


def texts_as_candidates(keys, texts=None):
    """Return text candidates. texts: None if the keys are the texts."""
    texts = keys if texts is None else texts
    return Candidates(keys, lambda i: mmeb_input(texts[i]))


def clips_as_candidates(folders, root, target, n=NUM_FRAMES):
    """Return video candidates of n frames. A key is the path of the folder, relative to the root."""
    keys = [folder.relative_to(root).as_posix() for folder in folders]
    return Candidates(keys, lambda i: clip_input(folders[i], target, n))


def sample_frames(folder, n=NUM_FRAMES):
    """Return n frames, evenly spread, of a folder of frame files in natural order (2 before 10).

    All frames if there are fewer, or if n is None. A missing or empty folder is returned as if it were a frame: it is
    an unreadable image, so the input is a miss.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png"))]
    names.sort(key=natural_order)
    if n:
        names = thinned(names, n)
    if not names:
        return [str(folder)]
    return [os.path.join(folder, name) for name in names]


def natural_order(name):
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)]


# --------------------------------------------------------------------------------------------------------------
# A row of an image or video task -> ParsedRow. Odd details are those of the published parsers.


def parse_row(about, row, media, root, name):
    """Return the ParsedRow. name: of the row, for messages."""
    try:
        if about["modality"] == "image":
            return image_row(about, row, media)
        return video_row(about, row, media, root)
    except BadInput:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{name}: not in the published form ({error!r})") from error


def image_row(about, row, media):
    candidates = image_candidates(about["parser"], row, media)
    return ParsedRow(image_query(about["parser"], row, media), candidates, candidates.keys[0])  # the first one is right


def image_query(kind, row, media):
    instruction = row["qry_inst"].replace("<|image_1|>", "")
    if kind == "image_t2i":
        return mmeb_input(f"{instruction} {row['qry_text']}")
    if kind in ("image_qa", "image_i2i_vg"):
        instruction = instruction.strip()
    text = instruction
    if row["qry_text"]:
        text += f" {row['qry_text']}"
    return mmeb_input(as_in_v1(text), [os.path.join(media, row["qry_img_path"])])


def image_candidates(kind, row, media):
    captions = row["tgt_text"]
    if kind not in ("image_t2i", "image_i2i_vg"):
        return texts_as_candidates(captions)
    target = row["tgt_inst"].replace("<|image_1|>", "")
    has_captions = captions[0].strip() != ""  # a blank first caption means that there are none
    pairs = list(zip(row["tgt_img_path"], captions))

    def build(i):
        path, caption = pairs[i]
        text = f"{target} {caption}" if has_captions else target
        return mmeb_input(as_in_v1(text), [media / path])

    if kind == "image_t2i":
        return Candidates([path for path, _ in pairs], build)
    keys = [f"{path}:" + caption.strip('"') for path, caption in pairs]  # several regions of one image
    return Candidates(keys, build)


def as_in_v1(text):
    return text.replace(" \n", "\n")


def video_row(about, row, media, root):
    ask = about["query_instruction"]
    if about["parser"] in ("video_classification", "ssv2"):
        classes = one_or_more(row[about["columns"][-1]])
        return ParsedRow(clip_input(media / str(row["video_id"]), ask), texts_as_candidates(classes), row["pos_text"])
    if about["group"] == "V-QA":
        question = video_question(about["parser"], row)
        query = clip_input(media / str(question.folder), f"{ask} {question.text}")
        return ParsedRow(query, texts_as_candidates(question.options, question.option_texts), question.right)
    if about["group"] == "V-RET":
        name, caption = (row[column] for column in about["columns"])
        if about["parser"] == "didemo":  # the only task with a file name here
            name = Path(name).stem
        clip = Candidates([name], lambda _: clip_input(media / str(name), about["target_instruction"]))
        return ParsedRow(mmeb_input(f"{ask} {one_or_more(caption)[0]}"), clip, name)
    if about["parser"] == "moment_retrieval":
        return moment_row(about, row, media, root)
    return momentseeker_row(about, row, media, root)


def moment_row(about, row, media, root):
    """The folders next to "query" are the candidates. Those named "positive..." are right."""
    folder = media / Path(row["video_path"]).stem
    if not folder.is_dir():
        raise MissingFile(f"{folder} does not exist; its sub-folders are the query and the candidates")
    clips = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "query")
    candidates = clips_as_candidates(clips, root, about["target_instruction"])
    right = [key for key, path in zip(candidates.keys, clips) if path.name.startswith("positive")]
    if not right:
        raise MissingFile(f"{folder} has no sub-folder positive*")
    query = clip_input(folder / "query", f"{about['query_instruction']} {row['query']}")
    return ParsedRow(query, candidates, right[-1:])


def momentseeker_row(about, row, media, root):
    """The query has a video, an image or only text. All saved frames are used."""
    ask = about["query_instruction"]
    given = row["input_frames"]
    if given.endswith(".mp4"):
        query = clip_input(momentseeker_folder(media, given), f"{ask['video']} {row['query']}", n=None)
    elif given.endswith(".jpg"):
        query = mmeb_input(f"{ask['image']} {row['query']}", [media / f"query_{given}"])
    else:
        query = mmeb_input(f"{ask['text only']} {row['query']}")

    clips = [momentseeker_folder(media, entry["output_path"]) for entry in row["positive_frames"]]
    num_right = len(clips)
    clips += [momentseeker_folder(media, entry["output_path"]) for entry in row["negative_frames"]]
    candidates = clips_as_candidates(clips, root, about["target_instruction"], n=None)
    return ParsedRow(query, candidates, candidates.keys[:num_right])


def momentseeker_folder(media, path):
    return media / "video_frames" / path.replace("/", "_").split(".mp4")[0]


class Question(NamedTuple):
    folder: str  # of the frames
    text: str
    options: list[str]  # the keys of the candidates
    right: str  # the key of the right one
    option_texts: list[str] | None = None  # None: the options themselves


def video_question(kind, row):
    """Return the Question of a row. kind: the parser."""
    if kind == "activitynetqa":
        text = f"{row['question']}? (A) yes; (B) no."
        return Question(f"v_{row['video_name']}", text, ["yes", "no"], row["answer"])
    if kind == "nextqa":
        options = [row[f"a{i}"] for i in range(5)]
        text = question_with_options(row["question"], lettered(options))
        return Question(row["video"], text, options, options[int(row["answer"])])
    if kind == "mvbench":
        return mvbench_question(row)
    if kind == "videomme":
        options = row["options"]
        text = "\n".join([row["question"], *options])
        return Question(row["videoID"], text, options, options["ABCD".index(row["answer"])], without_letters(options))
    options = row["option"]  # egoschema
    text = row["question"] + " ".join(options)
    return Question(row["video_idx"], text, options, options[int(row["answer"])], without_letters(options))


def mvbench_question(row):
    options = lettered(row["candidates"])
    right_index = -1  # an answer that is not an option becomes "(@) ...", which matches no candidate
    for i, option in enumerate(row["candidates"]):
        if option == row["answer"]:
            right_index = i  # the last of several
    right = f"({chr(65 + right_index)}) {row['answer']}"
    text = question_with_options(row["question"], options)
    return Question(f"{row['subset']}/{row['video']}", text, options, right)


def lettered(options):
    return [f"({chr(65 + i)}) {option}" for i, option in enumerate(options)]


def question_with_options(question, options):
    return "\n".join([question, "Options:", *options]).rstrip()


def without_letters(options):
    """Return each option's text, "Apples" of "A. Apples.", exactly as the published parser does."""
    return [option[option.find(". ") :].strip(". ") for option in options]


# --------------------------------------------------------------------------------------------------------------
# Pages of documents


def visdoc_rows(about, folder, media, vidore_instruction):
    """Return (ParsedRow of every query, the corpus). Every page is a candidate of every query."""
    ask = about["query_instruction"]
    target = about["target_instruction"]
    if not vidore_instruction and about["parser"] != "visrag":
        ask = target = ""

    def pages(keys):
        return Candidates(keys, lambda i: mmeb_input(target, [page_file(about, media, keys[i])]))

    keys = [row["corpus-id"] for row in visdoc_table(about, folder, "corpus", ["corpus-id"])]
    write_absent_pages({key: page_file(about, media, key) for key in keys}, about, folder)
    relevant = relevant_pages(visdoc_table(about, folder, "qrels", ["query-id", "corpus-id", "score"]))
    parsed = []
    for row in visdoc_table(about, folder, "queries", ["query-id", "query"]):
        grades = relevant.get(row["query-id"])
        if not grades:
            raise BadInput(f"{about['repo']}: query {row['query-id']} has no relevant page in the qrels")
        query = mmeb_input(f"{ask} {row['query']}")
        labels = list(grades)
        parsed.append(ParsedRow(query, pages(labels), labels, list(grades.values())))
    return parsed, pages(keys)


def visdoc_table(about, folder, config, columns):
    rows = []
    for path in annotation_files(folder, config, about["split"]):
        rows += read_table(path, columns)
    return rows


def page_file(about, media, key):
    if about["parser"] == "vidore":
        return media / f"{key}.png"
    stem, ending = os.path.splitext(str(key))
    digest = hashlib.md5(str(key).encode()).hexdigest()[:8]  # keys may be too long for a file name
    return media / f"{stem[:50]}_{digest}{ending}"


def write_absent_pages(files, about, folder):
    """Write the missing pages of {key: path} from the bytes in the corpus table, as the official loader does."""
    absent = {key: path for key, path in files.items() if not path.exists()}
    if not absent:
        return
    for table in annotation_files(folder, "corpus", about["split"]):
        for row in read_parquet(table, ["corpus-id", "image"], batch_size=16):
            path = absent.pop(row["corpus-id"], None)
            if not path:
                continue
            page = (row["image"] or {}).get("bytes")
            if not page:
                raise BadInput(f"{table}: the page {row['corpus-id']} has no image. Download the file again")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, lambda temporary, page=page: temporary.write_bytes(page))


def relevant_pages(qrels):
    """Return {query: {page: highest grade}}, in the order of first appearance."""
    relevant = {}
    for row in qrels:
        if row["score"] > 0:
            grades = relevant.setdefault(row["query-id"], {})
            grades[row["corpus-id"]] = max(row["score"], grades.get(row["corpus-id"], 0))
    return relevant


# --------------------------------------------------------------------------------------------------------------
# The check of the files: eval.py --check


class FileCheck(NamedTuple):
    counts: list  # queries, known queries, candidates, media files, unusable media files; "" if not known
    problems: list[str]
    needed: str  # the archive or repository to download if there are problems


def check_files(names, load, root):
    """Check the files of the tasks without a model. Print what exists, what is missing and how to get it.

    Return whether all files exist. load: name -> Task; raises OSError or ValueError if the task's file is missing or
    broken.
    """
    checks = {name: check_task_files(name, load) for name in Progress(names, desc="check", unit="task")}
    print_checks(checks)
    tasks_that_need = {}
    for name, check in checks.items():
        if check.problems:
            tasks_that_need.setdefault(check.needed, []).append(name)
    for needed, tasks in tasks_that_need.items():
        if needed:  # own tasks need no download; the table has their problem
            of_annotations = f"hf download --repo-type dataset {needed} --local-dir ROOT/annotations/{needed}"
            commands = ASSET["archives"].get(needed, [of_annotations])
            commands = [command.replace("ROOT", root) for command in commands]
            print(f"\nmissing for {', '.join(tasks)}:", *commands, sep="\n    ")
    return not tasks_that_need


def check_task_files(name, load):
    about = MMEB.get(name, {"repo": "", "archive": "", "num_queries": ""})
    try:
        task = load(name)
        items = [*(query["input"] for query in task.queries), *task.candidates.values()]
        paths = {(path, kind == "video") for item in items for kind in ("images", "video") for path in item[kind]}
        with ThreadPoolExecutor(16) as threads:
            problems = [problem for problem in threads.map(image_problem, sorted(paths)) if problem]
    except (OSError, ValueError) as error:
        return FileCheck(["", about["num_queries"], "", "", ""], [str(error)], about["repo"])
    counts = [len(task.queries), about["num_queries"], len(task.candidates), len(paths), len(problems)]
    return FileCheck(counts, problems, about["archive"])


def image_problem(path_and_kind):
    """Decode the image as a run would. Return why it is unreadable, or ""."""
    path, is_frame = path_and_kind
    try:
        open_image(path, is_frame=is_frame)
    except Skip as error:
        return str(error)
    return ""


def print_checks(checks):
    rows = [["task", "queries", "known", "candidates", "files", "unusable"]]
    problems = ["first problem", ""]
    complete = 0
    other_number = 0
    for name, check in checks.items():
        found, known = check.counts[:2]
        complete += not check.problems
        other_number += known != "" and found != known
        first_problem = next(iter(check.problems), "")
        problems.append(first_problem.removesuffix(HOW_TO_GET))  # the commands below the table say it
        rows.append([name, *map(str, check.counts)])
    for line, problem in zip(text_table(rows).splitlines(), problems):
        print(f"{line}  {problem}".rstrip())
    print(f"{complete} of {len(checks)} tasks are complete; {other_number} do not have the known number of queries")


# --------------------------------------------------------------------------------------------------------------
# Scores next to the published ones


def paper_table(model, tasks, means, modes):
    """Return a table of our modes and the published rows, in the columns of the paper's main table.

    tasks: names of the scored tasks. means: {column: {mode: mean} or None} of groups, modalities and "All".
    """
    columns = ASSET["columns"]
    incomplete = {column for column in columns if not tasks_of_column(column) <= set(tasks)}
    rows = [["", *columns]]
    for mode in modes:
        cells = []
        for column in columns:
            mark = "*" if column in incomplete else ""
            cells.append(f"{100 * means[column][mode]:.1f}{mark}" if means.get(column) else "-")
        rows.append([f"{model} {mode}", *cells])
    for name, published in ASSET["published"].items():
        rows.append([name, *(f"{x:.1f}" for x in published)])
    text = f"\nMMEB-V2 next to published results (hit@1 of image and video, ndcg@5 of visdoc, in %)\n{text_table(rows)}"
    absent = [name for name in MMEB if name not in tasks]
    if absent:
        text += (f"\n{len(MMEB) - len(absent)} of {len(MMEB)} tasks: no overall; * some of the group's tasks are "
                 f"missing, in all {', '.join(absent)}")  # fmt: skip
    return text


def tasks_of_column(column):
    return {name for name, about in MMEB.items() if column in (about["group"], about["modality"], "All")}


def leaderboard(tasks, mode, about_model):
    """Return the content of a file for the MMEB leaderboard. Fill in the dates and the url before you submit it.

    tasks: the tasks of scores.json. about_model: the first keys of the metadata. ndcg of the three graded tasks is the
    aligned one (departure 5 of eval.py).
    """
    metrics = {"image": {}, "video": {}, "visdoc": {}}
    for name, about in MMEB.items():
        corrected = name in ("ViDoSeek-page", "MMLongBench-page")
        result = "FILE_N/A"
        if name in tasks:
            num_queries = tasks[name]["num_queries"]
            result = tasks[name][mode] | {"num_pred": num_queries, "num_data": num_queries}
        metrics[about["modality"]][f"{name}-fixed" if corrected else name] = result
    now = datetime.now(UTC).isoformat(timespec="seconds")
    metadata = about_model | {
        "max_length_tokens": None,
        "model_release_date": now[:10],
        "data_source": "Self-Reported",
        "url": "",
        "report_generated_date": now,
    }
    return {"metadata": metadata, "metrics": metrics}
