"""The stages as a user starts them: the commands of README and docs/ with tiny sizes."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, picture, read_log, run_here

import eval as ev
import rl as rl_file
import sft as sft_file
from model import Embedder
from support.toy import TASKS


def start_script(script, *flags, ok=True):
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory):
    from support.toy import write_toy

    path = tmp_path_factory.mktemp("toy")
    write_toy(path, pairs=16, rl_pairs=12, dev=2, test=4, candidates=8)
    return path


def test_readme_runs_the_three_stages():
    """The first command of the README is the complete pipeline, which .ci/run executes. The second is the tests."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert re.findall(r"python (\w+\.py)", blocks[0]) == ["sft.py", "rl.py", "eval.py"]
    assert "-m pytest" in blocks[1]
    assert all("pip install -q -r requirements.txt" in block for block in blocks[:2])


def test_pipeline_on_the_toy_world(toy_data, tmp_path):
    """SFT from the shipped base, RL from its folder, evaluation of both: the README's commands with small sizes."""
    sft, rl, out = tmp_path / "sft", tmp_path / "rl", tmp_path / "eval"
    common = ["--media_root", toy_data, "--batch_size", 4, "--workers", 0]
    start_script("sft.py", "--data", toy_data / "sft.json", "--out", sft, "--steps", 3, *common)
    start_script("rl.py", "--model", sft, "--data", toy_data / "rl.json", "--out", rl, "--steps", 2, *common,
                 "--max_new_tokens", 40, "--G", 4)  # fmt: skip
    printed = start_script("eval.py", "--root", toy_data, "--model", sft, rl, "--out", out, "--samples", 2,
                           "--max_new_tokens", 24)  # fmt: skip
    assert "change in points" in printed
    for folder, steps in ((sft, 3), (rl, 2)):
        log = read_log(folder)
        assert [line["step"] for line in log] == [*range(1, steps + 1)]
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert {line["dataset"] for line in lines} <= {*TASKS}
        assert all(math.isfinite(value) for line in log for value in line.values())
        for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "args.json",
                     "preprocessor_config.json", "generation_config.json"):  # fmt: skip
            assert (folder / name).exists(), name
    for name in ("reward_query", "format_target", "share_query", "gap_target", "kl", "entropy", "clip_share",
                 "logp_mismatch", "length_query", "invalid_share", "no_spread_share",
                 "small_spread_share"):  # fmt: skip
        assert name in read_log(rl)[0], name
    assert read_log(rl)[0]["kl"] == 0  # fp32: the policy starts as the reference
    scores = json.loads((out / "rl" / "scores.json").read_text())
    assert len(scores["tasks"]) == 7
    for task in scores["tasks"].values():
        assert {"gen", "disc", "oracle", "gen_disc", "disc_gen", "pass@k", "invalid", "seconds"} <= task.keys()
        assert task["oracle"]["hit@1"] >= max(task["gen"]["hit@1"], task["disc"]["hit@1"])


@pytest.mark.parametrize("module, wrong_preset", [(sft_file, "one of .*toy"), (rl_file, "one of .*toy"), (ev, "2")])
def test_flags_of_the_command_line(module, wrong_preset, monkeypatch, capsys):
    """--help lists all settings with their meaning and default. A misspelt flag or preset is an error."""
    with pytest.raises(SystemExit) as end:
        run_here(module, ["--help"], monkeypatch)
    text = capsys.readouterr().out
    assert end.value.code in (0, None)
    assert text.count("(default:") >= 10 and "--preset" in text and "--no_" not in text
    with pytest.raises(SystemExit, match="unknown: --stepz 3. See --help for the flags"):
        run_here(module, ["--stepz", 3], monkeypatch)
    with pytest.raises(SystemExit, match=wrong_preset):
        run_here(module, ["--preset", "3b"], monkeypatch)


# Every line of the code blocks of README and docs/ that starts a program, by its first words, and what runs for it:
# {} is the line itself after SMALL's replacements. Lines that only fetch from the hub cannot run.
SMALL = {
    "torchrun --nproc_per_node 8": "torchrun --nproc_per_node 2", "--batch_size 1024": "--batch_size 4",
    "--preset 2b": "--preset toy", "Qwen/Qwen2-VL-2B-Instruct": "tiny", "zai-org/GLM-4.1V-9B-Thinking": "tiny",
    "zhibinlan/UME-R1-2B": "runs/2b/rl", "UME-sft-train.json": "toy/sft.json", "UME-rl-train.json": "toy/rl.json",
    "MMEB-train": "toy", "MORE_PAIRS": "toy/rl_dev.json", " PAIRS ": " toy/rl_test.json ", " DIR ": " toy ",
    "data/MMEB": "mini_mmeb_root", "/tmp/mini": "mini", "tests/data": f"{ROOT}/tests/data",
    " assets": f" {ROOT}/assets", 'device="cuda"': 'device="cpu"', "=512": "=16", "step-1000": "step-1",
    '"runs/toy/rl"': '"writer"', "runs/toy/data": "toy",
}  # fmt: skip
SFT = "{} --model tiny --steps 2 --save_every 1 --batch_size 4 --pass_tokens 300 --workers 0"
RL = "{} --steps 1 --batch_size 4 --max_new_tokens 16 --workers 0"
EVAL = "{} --max_new_tokens 16 --workers 0"
COMMANDS = {
    "python data.py check UME": "{} --workers 1",
    "torchrun --nproc_per_node 8 sft.py --preset 2b --data UME": SFT,
    "torchrun --nproc_per_node 8 rl.py  --preset 2b --data UME": RL,
    "torchrun --nproc_per_node 8 eval.py --preset 2b --model runs/2b/rl": EVAL,
    "torchrun --nproc_per_node 8 data.py annotate": "{} --max_new_tokens 16",
    "python data.py check sft.json": "{} --workers 1 || true",  # the tiny teacher has written no usable row
    "python data.py rl-subset": "touch sft.json && {} --size 60",
    "torchrun --nproc_per_node 8 sft.py --preset 2b --data sft": SFT.replace("{}", "cp toy/sft.json sft.json && {}"),
    "torchrun --nproc_per_node 8 rl.py  --preset 2b --data rl": RL,
    "python data.py export": "{}",
    "python eval.py --check": "{}",
    "torchrun --nproc_per_node 8 eval.py --preset 2b --model zhi": EVAL,
    "python eval.py --preset 2b --model runs/2b/rl --root data/MMEB --tasks image": EVAL,
    "python eval.py --preset 2b --model runs/2b/rl --root data/MMEB --tasks I-QA": EVAL,
    "python eval.py --preset 2b --model runs/2b/sft --reasoner runs/2b/rl":  # one that has learned to write <gen_emb>
    "rm -rf runs/2b/rl && cp -r writer runs/2b/rl && {} --max_new_tokens 24 --workers 0 --samples 1",
    "python eval.py --preset 2b --root data/MMEB --export": "{} --tasks VOC2007 HMDB51",
    "python eval.py --preset 2b --model runs/2b/rl --reasoner answers": f"{EVAL} --tasks VOC2007 HMDB51 --samples 0",
    "mkdir -p /tmp/mini": "{}",
    "python eval.py --model assets/toy_base": "{} --workers 0",
}
STARTS = r"(python3?|torchrun|mkdir|\.venv|hf|tar|cat|source|pip|PYTHONPATH=\S*) "
ELSEWHERE = (  # CI runs its own two commands, test_annotate.py the chain on real pictures; the rest is the download
    "python3 -m venv", ".venv/bin/", "source .venv", "PAIRS=", "python data.py annotate --pairs $",
    "python data.py check $", "python sft.py --data $", "hf ", "python - <<", "D=", "$D", "F=", "tar ", "cat ",
    "mkdir -p ROOT", "pip install mteb", "PYTHONPATH=. python docs/mteb_model.py",  # test_mteb.py has it
)  # fmt: skip


# what the client of a server in docs/mmeb.md sees here, where there is none
STAND_IN_FOR_OPENAI = """
from types import SimpleNamespace as Name
def create(model, messages, temperature):
    system, user = messages
    assert system["content"] == "You are a helpful assistant."
    content = user["content"]
    assert content[-1]["text"].endswith("represent the entire input.")
    assert all(part["image_url"]["url"].startswith("data:image") for part in content[:-1])
    message = Name(content=f"<think>{len(content)} parts</think><answer>a thing<gen_emb>")
    return Name(choices=[Name(message=message)])
OpenAI = lambda base_url, api_key: Name(chat=Name(completions=Name(create=create)))
"""


@pytest.mark.slow
def test_every_command_of_readme_and_docs(toy_data, tiny_dir, writer_dir, tmp_path):
    """Bug story: the README's command for the miniature of MMEB ended in a KeyError after all its work."""
    (tmp_path / "toy").symlink_to(toy_data)
    (tmp_path / "tiny").symlink_to(tiny_dir)
    shutil.copytree(writer_dir, tmp_path / "writer")
    shutil.unpack_archive(ROOT / "tests/data/mini_mmeb_root.tar.gz", tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("star.png", "pictures/0.png", "pictures/1.png"):
        picture(len(name)).save(tmp_path / name)
    (tmp_path / "openai.py").write_text(STAND_IN_FOR_OPENAI)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
           "PYTHONPATH": f"{ROOT}:{tmp_path}"}  # fmt: skip
    waiting = dict(COMMANDS)

    def small(text):
        for full, replacement in SMALL.items():
            text = text.replace(full, replacement)
        return text

    def run(text, command, **more):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, **more)
        assert done.returncode == 0, f"{text}\n{command}\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}"

    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    seen = set()  # some stand in both
    for block in [block for page in pages for block in page.read_text().split("```")[1::2]]:
        language, _, code = block.partition("\n")
        if language == "python":
            run(code, [sys.executable, "-c", small(code)])
            continue
        for line in re.sub(r" *\\\n *", " ", code).splitlines():  # a command may continue on the next line
            if line in seen or line.startswith(ELSEWHERE) or not re.match(STARTS, line):
                continue
            seen.add(line)
            start = next((start for start in waiting if line.startswith(start)), None)
            assert start, f"not run by this test: {line}"
            command = waiting.pop(start).format(small(line.split("   #")[0]))
            run(line, re.sub(r"(\w+\.py) ", rf"{ROOT}/\1 ", command), shell=True)
    assert not waiting, "README and docs have these no longer"


def test_the_search_snippet_follows_the_images(writer_dir, tmp_path, monkeypatch, capsys):
    """Bug story: docs/data.md's index kept the zero vector of a truncated image after its repair."""
    page = (ROOT / "docs/data.md").read_text()
    code = next(block for block in page.split("```python\n")[1:] if "path_of" in block).split("```")[0]
    code = code.replace('"runs/2b/rl"', repr(str(writer_dir))).replace('device="cuda", dtype=torch.bfloat16', "")
    code = code.replace("=512", "=24")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()

    def search():
        exec(code, {})  # noqa: S102
        return capsys.readouterr().out

    for n in range(3):
        picture(n).save(tmp_path / f"pictures/{n}.png")
    whole = (tmp_path / "pictures/0.png").read_bytes()
    (tmp_path / "pictures/0.png").write_bytes(whole[:200])
    with pytest.warns(UserWarning, match="0.png"):
        first = search()
    valid = Embedder.from_pretrained(writer_dir).embed([picture(1), picture(2)], max_new_tokens=24).valid
    assert f"3 new images: 1 unreadable, {2 - int(valid.sum())} without <gen_emb>" in first
    (tmp_path / "pictures/0.png").write_bytes(whole)
    picture(7).save(tmp_path / "pictures/2.png")
    again = search()
    assert "2 new images: 0 unreadable" in again and "0.png" in again
    assert "0 new images" in search()
