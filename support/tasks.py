"""The tasks of a run: which there are, which are wanted, and your own ones.

A task of your own is ROOT/tasks/NAME.json. It is read and checked before anything is embedded.
"""

import sys
from pathlib import Path

from support.distributed import barrier, processes
from support.files import read_json, stable_hash
from support.formats import check_input, check_keys
from support.mmeb import HOW_TO_GET, MMEB, tasks_of_column
from support.program import BadInput, MissingFile
from support.settings import same_on_all_ranks

TASK_KEYS = ("name", "modality", "group", "eval_type", "main_metric", "queries", "candidates")  # of the file
QUERY_KEYS = ("input", "labels", "grades", "candidates")


def known_tasks(root):
    folder = Path(root) / "tasks"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.json"))


def choose_tasks(settings):
    """Return the names of the wanted tasks.

    Without --tasks these are ROOT/tasks/test and those of the 78 that have annotations. With --check they are all of
    ROOT/tasks, and all of the 78 unless ROOT has only own tasks.
    """
    root = Path(settings.root)
    known = known_tasks(root)
    own = [name for name in known if settings.check or name.startswith("test/")]
    check_all = settings.check and (settings.tasks or not own or (root / "annotations").is_dir())
    published = [name for name, about in MMEB.items()
                 if check_all or (root / "annotations" / about["repo"]).is_dir()]  # fmt: skip
    if not settings.tasks:
        if not own + published:
            hint = f" To run your own: --tasks {' '.join(known)}." if known else ""
            raise SystemExit(f"{root} has no task files in tasks/test and no files of MMEB in annotations.{hint} To "
                             "make the toy world: python data.py toy. To get MMEB: python eval.py --check --root "
                             "ROOT --tasks image video visdoc")  # fmt: skip
        return own + published
    names = []
    for wanted in settings.tasks:
        members = tasks_of_column(wanted) if wanted not in known else []
        present = [name for name in published if name in members]
        if members and not present:
            raise MissingFile(f"--tasks {wanted}: {root}/annotations has none of its {len(members)} tasks{HOW_TO_GET}")
        names += present or [wanted]
    return list(dict.fromkeys(names))


def load_on_all_ranks(names, load, settings, group=None):
    """Return the tasks. Rank 0 loads them first, because it may have to write pages.

    Raise BadInput if the tasks or the settings differ between ranks.
    """
    rank, _ = processes()
    for turn in range(2):
        if (rank > 0) == turn:
            tasks = [load(name) for name in names]
        barrier(group)
    same_on_all_ranks({f"content of {task.name}": stable_hash(vars(task)) for task in tasks} | settings, group)
    return tasks


def load_own_task(name, path, root, metrics):
    """Return the fields of eval.py's Task. metrics: the names that main_metric may have."""
    raw = read_json(path)
    check_task(raw, path, metrics)
    queries = [read_query(raw, i, path, root) for i in range(len(raw["queries"]))]
    check_labels(queries, raw["candidates"], path)
    candidates = {}
    for key, item in raw["candidates"].items():
        candidates[key] = located(item, f"{path}, candidate {key!r}", root)
    fields = {key: raw[key] for key in ("modality", "group", "eval_type", "main_metric")}
    return fields | {"name": name, "queries": queries, "candidates": candidates}


def require(right, message):
    if not right:
        raise BadInput(message)


def check_task(raw, path, metrics):
    """Raise BadInput if the file is not a task. The content of queries and candidates is checked later."""
    check_keys(raw, "a task", path, TASK_KEYS)
    missing = [key for key in TASK_KEYS[1:] if key not in raw]  # the file's name is the task's name
    require(not missing, f"{path}: the keys {missing} are missing")
    strings = isinstance(raw["modality"], str) and isinstance(raw["group"], str)
    require(strings, f"{path}: modality and group must be strings")
    eval_type = raw["eval_type"]
    require(eval_type in ("global", "local"), f"{path}: eval_type is {eval_type!r}, not global or local")
    metric = raw["main_metric"]
    require(metric in metrics, f"{path}: main_metric {metric!r} is not one of {', '.join(metrics)}")
    containers = isinstance(raw["queries"], list) and isinstance(raw["candidates"], dict)
    require(containers, f"{path}: queries must be a list, candidates an object of key: input")
    require(raw["queries"] and raw["candidates"], f"{path}: has no queries or no candidates")


def read_query(raw, i, path, root):
    """Return query i of the file, checked."""
    query = raw["queries"][i]
    name = f"{path}, query {i}"
    check_keys(query, "a query", name, QUERY_KEYS)
    require("input" in query and "labels" in query, f"{name}: input or labels are missing")
    labels = keys_of(query["labels"])
    require(labels, f"{name}: labels must be a key or a list of keys, not {query['labels']!r}")
    grades = query.get("grades")
    if grades is not None:
        right = isinstance(grades, list) and len(grades) == len(labels) and all(map(is_grade, grades))
        require(right, f"{name}: grades must be one number per label, above 0 and at most 100, not {grades!r}")
    listed = listed_candidates(query, raw, name)
    item = located(query["input"], name, root)
    return {"input": item, "labels": labels, "grades": grades, "candidates": listed}


def listed_candidates(query, raw, name):
    """Return the keys that a query of a local task ranks, None for a global task."""
    given = query.get("candidates")
    if raw["eval_type"] == "global":
        require(given is None, f"{name}: has candidates, but a global task ranks all. Make it local or remove them")
        return None
    listed = keys_of(given)
    require(listed, f"{name}: has no candidates (a list of keys), but the task is local")
    unknown = [key for key in listed if key not in raw["candidates"]]
    require(not unknown, f"{name}: ranks keys that are not candidates of the task: {unknown[:3]}")
    return listed


def check_labels(queries, pool, path):
    """Print a warning if some labels are not candidates. Raise BadInput if all of them are not."""
    outside = []
    num_labels = 0
    for i, query in enumerate(queries):
        rankable = query["candidates"] or pool
        num_labels += len(query["labels"])
        outside += [(i, label) for label in query["labels"] if label not in rankable]
    if not outside:
        return
    i, label = outside[0]
    message = (f"{path}: {len(outside)} of {num_labels} labels are no candidates and cannot be hit, e.g. {label!r} "
               f"of query {i}")  # fmt: skip
    require(len(outside) < num_labels, f"{message}; labels are keys of candidates")
    print(f"warning: {message}", file=sys.stderr)


def located(item, name, root):
    """Return the checked input with its media paths joined to the root."""
    item = check_input(item, name)
    for kind in ("images", "video"):
        item[kind] = [str(Path(root) / path) for path in item[kind]]
    return item


def keys_of(given):
    """Return a key or a list of keys as a list of strings, None if it is something else. JSON keys are strings."""
    keys = [given] if isinstance(given, (str, int)) else given
    if not isinstance(keys, list) or not all(map(is_key, keys)):
        return None
    return [str(key) for key in keys]


def is_key(x):
    return isinstance(x, (str, int)) and x is not True


def is_grade(x):
    """A key of grade 0 is wrong and must not be listed as a label. At most 100: exponential gain overflows at 1,024."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x <= 100
