"""Own tasks of eval.py: what is read, which faults are found before anything is embedded, and --check."""

import json

import pytest
from conftest import check_tasks
from PIL import Image
from test_eval import write_tasks
from test_images import animated

import eval as ev
from support.cache import input_key
from support.images import digest_of_file
from support.program import BadInput, MissingFile


def own_task(image="", **more):
    """A global task of one query and two candidates. image: the image of both candidates."""
    pool = {key: {"text": text, "images": [image] if image else []} for key, text in (("1", "a"), ("2", "b"))}
    return {"modality": "image", "group": "mine", "eval_type": "global", "main_metric": "hit@1",
            "queries": [{"input": {"text": "q"}, "labels": ["1"]}], "candidates": pool} | more  # fmt: skip


def with_query(**more):
    return own_task(queries=[{"input": {"text": "q"}, "labels": ["1"]} | more])


def write_task(root, content=None, name="mine", **more):
    """Write a task, or any bytes, as an own task."""
    content = own_task(**more) if content is None else content
    (root / "tasks").mkdir(exist_ok=True)
    path = root / f"tasks/{name}.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_load_task(tmp_path):
    """Media paths are joined to the root, labels may be missing among the candidates, missing keys become empty. The
    error of an unknown task lists the known ones."""
    write_tasks(tmp_path)
    task = ev.load_task("test/local_t", str(tmp_path))
    assert (task.name, task.modality, task.eval_type, task.main_metric) == ("test/local_t", "image", "local", "hit@1")
    assert task.queries[0]["input"]["images"] == [str(tmp_path / "images/x.png")]
    assert task.queries[2]["labels"] == ["not there"] and len(task.queries[0]["candidates"]) == 4
    assert task.candidates["red star"] == {"text": "red star", "images": [], "video": []}
    with pytest.raises(FileNotFoundError, match="'cls'.*test/cls, test/local_t"):
        ev.load_task("cls", tmp_path)
    with pytest.raises(FileNotFoundError, match="is --root right"):
        ev.load_task("test/cls", tmp_path / "nowhere")


@pytest.mark.parametrize("task, message", [
    (own_task(eval_type="globe"), "globe"),
    (own_task(main_metric="hit"), "main_metric 'hit'"),
    (own_task(queries=[]), "no queries"),
    (own_task(eval_type="local"), "query 0: has no candidates .* the task is local"),
    (with_query(candidates=["x"]) | {"eval_type": "local"}, "query 0: ranks keys .*'x'"),
    (with_query(grades=[1, 2]), "query 0: grades must be one number per label"),
    ({k: v for k, v in own_task().items() if k != "group"}, r"the keys \['group'\] are missing"),
    (with_query(labels=[["1"]]), r"query 0: labels must be a key or a list of keys, not \[\['1'\]\]"),
    *((with_query(labels=labels), "query 0: labels must be") for labels in (None, [])),
    *((with_query(grades=[x]), "query 0: grades must be one number per label") for x in ("good", float("nan"))),
    (with_query(grades=[-1]), "query 0: grades must be one number per label"),
    (with_query(grades=[0]), "query 0: grades must be one number per label, above 0"),
    (with_query(grades=[5000]), "query 0: grades must be one number per label"),
    (with_query(candidates=["1"]), "query 0: has candidates, but a global task ranks all"),
    (with_query(label="1"), "query 0: unknown key 'label'.*input, labels"),
    (with_query(input={"text": "q", "image": "a.png"}), "query 0: unknown key 'image'"),
    (with_query(input={"text": ["q"]}), "query 0: the text must be a string, not list"),
    (with_query(input={"text": "a <|im_end|> b"}), "query 0: the text contains the control token"),
    (with_query(input={"text": "\ud800"}), "query 0: .*half a surrogate pair"),
    (with_query(labels=["3"]), "1 of 1 labels are no candidates.*labels are keys"),
    (own_task(queries=[{"labels": ["1"]}]), "query 0: input or labels are missing"),
    (own_task(queries=["q"]), "query 0: expected a query"),
    (own_task(candidates=["a"]), "candidates an object"),
    (own_task(candidates={"1": None}), "candidate '1': an input must be"),
    (own_task(metric="hit@1"), "unknown key 'metric'"),
    (own_task(group=3), "must be strings"),
    ([own_task()], "expected a task"),
    (b"\xef\xbb\xbf{}", "not valid JSON in UTF-8.*BOM"),
    ("{}".encode("utf-16"), "not valid JSON in UTF-8"),
    (b'{"queries": [', "not valid JSON.*copy the file again"),
])  # fmt: skip
def test_own_tasks_are_validated_before_anything_is_embedded(tmp_path, capsys, task, message):
    """Bug story: a fault in a query ended the run as a KeyError after hours, or was a wrong number. The message has the
    file, the query and the remedy. --check goes on with the other tasks."""
    path = write_task(tmp_path, task)
    write_task(tmp_path, name="whole")
    with pytest.raises(BadInput, match=f"(?s)mine.json.*{message}"):
        ev.load_task("mine", tmp_path)
    assert check_tasks(tmp_path, "mine", "whole") == 1
    printed = capsys.readouterr().out
    assert str(path) in printed and "1 of 2 tasks are complete" in printed


def test_labels_that_are_numbers_or_outside_the_pool(tmp_path, capsys):
    """JSON's keys are strings, so the label 1 means the candidate "1". A label outside the pool cannot be hit. A
    warning gives their number."""
    write_task(tmp_path, queries=[{"input": {"text": "q"}, "labels": x} for x in (1, [1, 2], ["1", "gone"])])
    task = ev.load_task("mine", tmp_path)
    assert [query["labels"] for query in task.queries] == [["1"], ["1", "2"], ["1", "gone"]]
    assert "1 of 5 labels are no candidates and cannot be hit, e.g. 'gone' of query 2" in capsys.readouterr().err


def test_a_missing_blank_image_is_one_rule(tiny_dir, tmp_path, capsys):
    """Bug story: the authors' stand-in images/blank.jpg need not exist. --check said complete, and the run said that
    most media files do not exist. A missing one counts as white, so a black file in its place is another input."""
    write_task(tmp_path, image="images/blank.jpg")
    assert check_tasks(tmp_path, "mine") == 0
    run = ["--root", tmp_path, "--model", tiny_dir, "--out", tmp_path / "out", "--tasks", "mine", "--samples", 0,
           "--max_new_tokens", 2, "--workers", 0]  # fmt: skip
    run = list(map(str, run))
    ev.main(run)
    scores = json.loads((tmp_path / "out" / tiny_dir.name / "scores.json").read_text())
    assert scores["tasks"]["mine"]["unreadable"] == 0 and scores["encoded"] == {"greedy": 3}
    ev.main(run)
    assert "0 of 3 inputs embedded, the others from" in capsys.readouterr().out
    (tmp_path / "images").mkdir()
    Image.new("RGB", (28, 28)).save(tmp_path / "images/blank.jpg")
    ev.main(run)
    assert "2 of 3 inputs embedded" in capsys.readouterr().out
    # the model sees the same white image wherever the path points; another missing file counts as its path
    paths = [str(tmp_path / name) for name in ("a/blank.jpg", "b/blank.jpg", "a/gone.jpg", "b/gone.jpg")]
    digests = {path: digest_of_file(path) for path in paths}
    first, second, gone, other = (input_key({"text": "", "images": [path], "video": []}, digests) for path in paths)
    assert first == second and len({first, gone, other}) == 3
    assert digest_of_file(str(tmp_path / ("x" * 300) / "blank.jpg")) == ""  # a name that no disk can have


def test_own_tasks_may_not_have_a_published_name(tmp_path):
    """Bug story: tasks/GQA.json with four queries was written to the leaderboard's files. A task with a group's name
    would disappear as soon as there are annotations."""
    for name in ("GQA", "image", "I-QA"):
        write_task(tmp_path, name=name)
        with pytest.raises(BadInput, match=f"tasks/{name}.json.*published.*Rename"):
            ev.load_task(name, tmp_path)
        assert check_tasks(tmp_path, name) == 1


def test_check_of_own_and_unknown_tasks(tmp_path, capsys):
    """Bug story: --check of an unknown task ended with "missing for nope:" and nothing below it. Without --tasks it
    ignored own tasks. A file that a video uses as a frame is read as a frame."""
    write_task(tmp_path)
    assert check_tasks(tmp_path) == 0 and "1 of 1 tasks are complete" in capsys.readouterr().out
    write_task(tmp_path, name="broken", main_metric="hits")
    assert check_tasks(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "main_metric 'hits' is not one of" in printed and "1 of 2 tasks are complete" in printed
    assert check_tasks(tmp_path, "nope") == 1
    printed = capsys.readouterr().out
    assert "known tasks: broken, mine" in printed and "missing for" not in printed
    animated(tmp_path / "clip.png")
    write_task(tmp_path, name="moving", queries=[{"input": {"video": ["clip.png", "clip.png"]}, "labels": ["1"]}])
    write_task(tmp_path, name="still", image="clip.png")
    assert check_tasks(tmp_path, "still") == 0
    assert check_tasks(tmp_path, "moving") == 1 and "holds 3 images" in capsys.readouterr().out


def test_groups_without_annotations(tmp_path, capsys):
    """Bug story: --tasks image without annotations said that tasks/image.json does not exist, as if it were a task."""
    write_task(tmp_path)
    with pytest.raises(MissingFile, match="--tasks image: .*annotations has none of its 36 tasks.*--check"):
        ev.main(["--root", str(tmp_path), "--tasks", "image"])
    with pytest.raises(SystemExit, match=r"your own: --tasks mine\."):
        ev.main(["--root", str(tmp_path)])
    assert check_tasks(tmp_path, "I-VG") == 1 and "0 of 4 tasks are complete" in capsys.readouterr().out
    (tmp_path / "annotations").mkdir()
    assert check_tasks(tmp_path) == 1 and "1 of 79 tasks are complete" in capsys.readouterr().out
