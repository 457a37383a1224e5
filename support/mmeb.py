"""The 78 published tasks of MMEB: their files read, checked, and their scores beside the published ones.

Takes and gives plain values: fields of a task, rows, dicts of scores. eval.py imports this file, never the reverse.

assets/mmeb_v2.json names per task the repository of its annotations, the columns that are read, where its media lie,
the parser and its instructions. load_mmeb() follows it:

    ROOT/annotations/REPO  ->  annotation_files()  ->  read_table()  ->  parse_row(), or visdoc_rows()  ->  a task

An input is {"text", "images": [path], "video": [frame path]}, as everywhere.
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

from data import NUM_FRAMES, Skip, check_text, open_picture, thinned
from support.rows import check_columns, one_or_more, read_parquet, read_rows
from support.run import BadInput, MissingFile, Progress, text_table, write_file

ASSET = json.loads((Path(__file__).parent.parent / "assets" / "mmeb_v2.json").read_text(encoding="utf-8"))
MMEB = {task["name"]: task for task in ASSET["tasks"]}  # the 78 tasks as data, in the order of the published tables
GRADED = ("ViDoRe_esg_reports_human_labeled_v2", "ViDoSeek-doc", "MMLongBench-doc")  # labels of different grades

# --------------------------------------------------------------------------------------------------------------
# From the published files to the fields of a task


class Candidates(NamedTuple):
    keys: list[str | int]
    build: Callable  # place in keys -> the input; called for a new key only: lists of a thousand repeat row after row


class ParsedRow(NamedTuple):
    query: dict  # an input
    candidates: Candidates
    labels: str | int | list  # the key or keys of the right candidates
    grades: list | None = None  # one per label; None: all are equally right


def load_mmeb(name, root, vidore_instruction=True):
    """The fields of one of the 78 tasks, as eval.py's Task has them.

    The candidates keep the order in which their keys are first seen, the rows' before the corpus', and a key's first
    content.
    """
    about = MMEB[name]
    folder = root / "annotations" / about["repo"]
    media = media_folder(about, root)
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
        if about["eval_type"] == "local":  # interned: a thousand names a query would else be a thousand new strings
            listed = [sys.intern(key) for key in row.candidates.keys]
        queries.append({"input": row.query, "labels": one_or_more(row.labels), "grades": row.grades,
                        "candidates": listed})  # fmt: skip
    add_candidates(pool, corpus)

    check_texts(queries, pool, folder, name)
    if not queries:
        raise BadInput(f"{folder}: no rows for {name}")
    fields = {key: about[key] for key in ("name", "modality", "group", "eval_type", "main_metric")}
    return fields | {"queries": queries, "candidates": pool}


def media_folder(about, root):
    """The first of the places where the media may lie that is there."""
    places = [root / place for place in about["media"]]
    return next((place for place in places if place.is_dir()), places[0])


def parsed_rows(about, folder, media, root):
    """Yields the ParsedRow of every row of an image or video task."""
    rows = []
    for config in about["configs"]:
        for path in annotation_files(folder, config, about["split"]):
            rows += [row | {"subset": config} for row in read_table(path, about["columns"])]
    for i, row in enumerate(rows[: about.get("first_rows")]):
        yield parse_row(about, row, media, root, f"{folder}, row {i} of {about['name']}")


def add_candidates(pool, candidates):
    for place, key in enumerate(candidates.keys):
        if key not in pool:
            pool[key] = candidates.build(place)


def check_texts(queries, pool, folder, name):
    """Now, not after hours of embedding."""
    for i, query in enumerate(queries):
        check_text(query["input"]["text"], f"{folder}, query {i} of {name}")
    for key, item in pool.items():
        check_text(item["text"], f"{folder}, candidate {key!r} of {name}")


# --------------------------------------------------------------------------------------------------------------
# Annotation files

HOW_TO_GET = "; how to get them: python eval.py --check --root ROOT --tasks NAME"


def annotation_files(folder, config, split):
    """The files of one config and split: as the dataset card's configs say, else by their names."""
    files = files_of_card(folder, config, split) or files_by_name(folder, config, split)
    if not files:
        raise MissingFile(f"{folder} has no files of config {config or 'default'}, split {split}{HOW_TO_GET}")
    refuse_missing_shards(files)
    return files


SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?(\.\w+)")  # NAME-00000-of-00002.parquet; older ones have a hash


def refuse_missing_shards(files):
    """Raises where a shard of a table is missing: with fewer candidates the scores would be higher."""
    shards = {}  # (folder, NAME, ending) -> [(N, number)] of its NAME-number-of-N
    for path in files:
        if found := SHARD.fullmatch(path.name):
            name, number, total, ending = found.groups()
            shards.setdefault((path.parent, name, ending), []).append((total, int(number)))
    for (folder, name, ending), found in shards.items():
        totals = sorted({total for total, _ in found})
        if len(totals) > 1 or len(set(found)) < len(found):
            raise BadInput(f"{folder} holds files {name}-*{ending} of several downloads (of {', '.join(totals)}), and "
                           "rows would be read twice. Delete the older files")  # fmt: skip
        n = int(totals[0])
        first = int((totals[0], n) in found)  # some tools count from 1
        absent = sorted(set(range(first, first + n)) - {number for _, number in found})
        if absent:
            example = f"{name}-{absent[0]:0{len(totals[0])}}-of-{totals[0]}{ending}"
            raise MissingFile(f"{folder}: {len(absent)} of {n} files {name}-* are missing, e.g. {example}{HOW_TO_GET}")


def files_of_card(folder, config, split):
    card = None
    if (folder / "README.md").is_file():
        card = metadata_load(folder / "README.md")
    configs = {entry.get("config_name"): entry.get("data_files") for entry in (card or {}).get("configs", [])}
    parts = configs.get(config or "default")
    if not config and len(configs) == 1:  # the only one is the default one, whatever it is called
        parts = next(iter(configs.values()))
    files = []
    absent = []
    for part in parts or []:
        if isinstance(part, dict) and part["split"] == split:
            for pattern in one_or_more(part["path"]):
                found = sorted(folder.glob(pattern))
                files += found
                absent += [] if found else [pattern]
    if files and absent:
        raise MissingFile(f"{folder} has no file {absent[0]}, which its README.md names for split {split}{HOW_TO_GET}")
    return list(dict.fromkeys(files))  # two patterns may match one file


def files_by_name(folder, config, split):
    files = []
    for path in sorted(folder.rglob("*")):
        folders_and_name = path.relative_to(folder).parts
        of_config = config is None or config in folders_and_name or path.stem.endswith(config)
        of_split = split in path.stem or path.stem.endswith(str(config))
        if of_config and of_split and path.suffix in (".parquet", ".json", ".jsonl"):
            files.append(path)
    return files


def read_table(path, columns):
    """Rows of a parquet, json or jsonl file as dicts."""
    if path.suffix == ".parquet":
        return list(read_parquet(path, columns))
    rows = read_rows(path)
    if rows:
        check_columns(path, columns, set.intersection(*map(set, rows)))
    return rows


# --------------------------------------------------------------------------------------------------------------
# Inputs and candidates


def mmeb_input(text, images=(), video=()):
    """UME-R1 gives the media first and the text stripped, without the published marks of their places."""
    text = re.sub(r"<\|(image_1|image_pad|video_pad)\|>", "", text)
    return {"text": text.strip(), "images": [str(path) for path in images], "video": list(video)}


def clip_input(folder, text, n=NUM_FRAMES):
    return mmeb_input(text, video=sample_frames(folder, n))


def texts_as_candidates(keys, texts=None):
    """texts: where they are others than the keys."""
    texts = keys if texts is None else texts
    return Candidates(keys, lambda place: mmeb_input(texts[place]))


def clips_as_candidates(folders, root, target, n=NUM_FRAMES):
    """Videos of n frames; the key of one is its folder's path below the root."""
    keys = [folder.relative_to(root).as_posix() for folder in folders]
    return Candidates(keys, lambda place: clip_input(folders[place], target, n))


def sample_frames(folder, n=NUM_FRAMES):
    """n frames, evenly spread, of a folder of frame files in natural order (2 before 10); all where there are fewer,
    or n is None.

    A folder that is missing or empty stands for itself: it cannot be read as a picture, so the input is a miss.
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
# A row of an image or video task -> ParsedRow. What looks odd here is as the published parsers have it.


def parse_row(about, row, media, root, name):
    """name: of the row, for messages."""
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
    right = candidates.keys[0]  # it stands first
    return ParsedRow(image_query(about["parser"], row, media), candidates, right)


def image_query(kind, row, media):
    instruction = row["qry_inst"].replace("<|image_1|>", "")
    if kind == "image_t2i":
        return mmeb_input(f"{instruction} {row['qry_text']}")
    if kind in ("image_qa", "image_i2i_vg"):
        instruction = instruction.strip()
    text = instruction
    if row["qry_text"]:
        text += f" {row['qry_text']}"
    return mmeb_input(tidy(text), [os.path.join(media, row["qry_img_path"])])


def image_candidates(kind, row, media):
    captions = row["tgt_text"]
    if kind not in ("image_t2i", "image_i2i_vg"):
        return texts_as_candidates(captions)
    target = row["tgt_inst"].replace("<|image_1|>", "")
    has_captions = captions[0].strip() != ""  # a first one that is blank says that there are none
    pairs = list(zip(row["tgt_img_path"], captions))

    def build(place):
        path, caption = pairs[place]
        text = f"{target} {caption}" if has_captions else target
        return mmeb_input(tidy(text), [media / path])

    if kind == "image_t2i":
        return Candidates([path for path, _ in pairs], build)
    keys = [f"{path}:" + caption.strip('"') for path, caption in pairs]  # several regions of one picture
    return Candidates(keys, build)


def tidy(text):
    """As MMEB-V1 had it."""
    return text.replace(" \n", "\n")


def video_row(about, row, media, root):
    if about["parser"] in ("video_classification", "ssv2"):
        return video_class_row(about, row, media)
    if about["group"] == "V-QA":
        return video_qa_row(about, row, media)
    if about["group"] == "V-RET":
        return video_retrieval_row(about, row, media)
    if about["parser"] == "moment_retrieval":
        return moment_row(about, row, media, root)
    return momentseeker_row(about, row, media, root)


def video_class_row(about, row, media):
    query = clip_input(media / str(row["video_id"]), about["query_instruction"])
    classes = one_or_more(row[about["columns"][-1]])
    return ParsedRow(query, texts_as_candidates(classes), row["pos_text"])


def video_qa_row(about, row, media):
    question = video_question(about["parser"], row)
    query = clip_input(media / str(question.folder), f"{about['query_instruction']} {question.text}")
    return ParsedRow(query, texts_as_candidates(question.options, question.option_texts), question.right)


def video_retrieval_row(about, row, media):
    name, caption = (row[column] for column in about["columns"])
    if about["parser"] == "didemo":  # a file name there, a name elsewhere
        name = Path(name).stem
    query = mmeb_input(f"{about['query_instruction']} {one_or_more(caption)[0]}")
    clip = Candidates([name], lambda _: clip_input(media / str(name), about["target_instruction"]))
    return ParsedRow(query, clip, name)


def moment_row(about, row, media, root):
    """The folders beside "query" are the candidates, right where their names start with "positive"."""
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
    """The query has a video, a picture or only text; all saved frames are used."""
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
    """-> Question"""
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
    place = -1  # an answer that is no option becomes "(@) ..", which no candidate is called
    for i, option in enumerate(row["candidates"]):
        if option == row["answer"]:
            place = i  # the last of several
    right = f"({chr(65 + place)}) {row['answer']}"
    text = question_with_options(row["question"], options)
    return Question(f"{row['subset']}/{row['video']}", text, options, right)


def lettered(options):
    return [f"({chr(65 + i)}) {option}" for i, option in enumerate(options)]


def question_with_options(question, options):
    return "\n".join([question, "Options:", *options]).rstrip()


def without_letters(options):
    """Each option's text, "Apples" of "A. Apples."; published so, right or wrong."""
    return [option[option.find(". ") :].strip(". ") for option in options]


# --------------------------------------------------------------------------------------------------------------
# Pages of documents


def visdoc_rows(about, folder, media, vidore_instruction):
    """-> (ParsedRow of every query, the corpus): every page is a candidate of every query."""
    ask = about["query_instruction"]
    target = about["target_instruction"]
    if not vidore_instruction and about["parser"] != "visrag":
        ask = target = ""

    def pages(keys):
        return Candidates(keys, lambda place: mmeb_input(target, [page_file(about, media, keys[place])]))

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
    """Pages lie as files in the media folder; those that do not are written there from the corpus table, which holds
    their bytes (as the official loader does). files: {key: path}."""
    absent = {key: path for key, path in files.items() if not path.exists()}
    if not absent:
        return
    for table in annotation_files(folder, "corpus", about["split"]):
        for row in read_parquet(table, ["corpus-id", "image"], batch_size=16):
            path = absent.pop(row["corpus-id"], None)
            if path:
                write_page(path, row, table)


def write_page(path, row, table):
    if not row["image"] or not row["image"]["bytes"]:
        raise BadInput(f"{table}: the page {row['corpus-id']} has no picture; download the file again")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda temporary: temporary.write_bytes(row["image"]["bytes"]))


def relevant_pages(qrels):
    """{query: {page: highest grade}}, in order of first appearance."""
    relevant = {}
    for row in qrels:
        if row["score"] > 0:
            grades = relevant.setdefault(row["query-id"], {})
            grades[row["corpus-id"]] = max(row["score"], grades.get(row["corpus-id"], 0))
    return relevant


# --------------------------------------------------------------------------------------------------------------
# The check of the files: eval.py --check


class FileCheck(NamedTuple):
    counts: list  # queries, known queries, candidates, media files, unusable media files; "" where not known
    problems: list[str]
    needed: str  # what has to be downloaded where there are problems: an archive or a repository


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
        if needed:  # own tasks need no download: their problem is in the table
            print(f"\nmissing for {', '.join(tasks)}:", *download_commands(needed, root), sep="\n    ")
    return not tasks_that_need


def check_task_files(name, load):
    about = MMEB.get(name, {"repo": "", "archive": "", "num_queries": ""})
    try:
        task = load(name)
        items = [*(query["input"] for query in task.queries), *task.candidates.values()]
        paths = {(path, kind == "video") for item in items for kind in ("images", "video") for path in item[kind]}
        with ThreadPoolExecutor(16) as threads:
            problems = [problem for problem in threads.map(picture_problem, sorted(paths)) if problem]
    except (OSError, ValueError) as error:
        return FileCheck(["", about["num_queries"], "", "", ""], [str(error)], about["repo"])
    counts = [len(task.queries), about["num_queries"], len(task.candidates), len(paths), len(problems)]
    return FileCheck(counts, problems, about["archive"])


def picture_problem(path_and_kind):
    """Every picture is decoded, as a run would."""
    path, is_frame = path_and_kind
    try:
        open_picture(path, is_frame=is_frame)
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
        problems.append(first_problem.removesuffix(HOW_TO_GET))  # which stands below the table
        rows.append([name, *map(str, check.counts)])
    for line, problem in zip(text_table(rows).splitlines(), problems):
        print(f"{line}  {problem}".rstrip())
    print(f"{complete} of {len(checks)} tasks are complete; {other_number} have not the known number of queries")


def download_commands(needed, root):
    of_annotations = [f"hf download --repo-type dataset {needed} --local-dir ROOT/annotations/{needed}"]
    commands = ASSET["archives"].get(needed, of_annotations)
    return [command.replace("ROOT", root) for command in commands]


# --------------------------------------------------------------------------------------------------------------
# Scores beside the published ones


def paper_table(model, tasks, means, modes):
    """Our modes and the published rows in the columns of the paper's main table.

    tasks: names of the tasks that were scored; means: {column: {mode: mean} or None} of groups, modalities and "All".
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
    text = f"\nMMEB-V2 beside published results (hit@1 of image and video, ndcg@5 of visdoc, in %)\n{text_table(rows)}"
    absent = [name for name in MMEB if name not in tasks]
    if absent:
        text += (f"\n{len(MMEB) - len(absent)} of {len(MMEB)} tasks: no overall; * some of the group's tasks are "
                 f"missing, in all {', '.join(absent)}")  # fmt: skip
    return text


def tasks_of_column(column):
    return {name for name, about in MMEB.items() if column in (about["group"], about["modality"], "All")}


def leaderboard(tasks, mode, about_model):
    """The file that the MMEB leaderboard takes; fill in the dates and the url before you submit it.

    tasks: the tasks of scores.json; about_model: what the file says first. ndcg of the three graded tasks is the
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
