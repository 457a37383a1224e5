"""The three families in shards and as a user starts them. Run: pytest tests/test_families_slow.py -m slow"""

import json
import math
import shutil

import pytest
from conftest import MODELS, ROOT, read_log, save_random_model
from test_families import embedder, tiny_dir, writer, writer_dir  # noqa: F401
from test_pipeline import start_script as start
from test_scale import test_fsdp_equals_ddp, test_rl_in_shards_equals_replicas  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model_type", ["toy base", *MODELS])
def test_the_stages_on_real_pictures(model_type, real, tmp_path):
    """Toy base and random models of all families run as users start them: losses fall, RL begins at KL 0."""
    base, sft, rl = ROOT / "assets/toy_base", tmp_path / "sft", tmp_path / "rl"
    if model_type in MODELS:
        base = save_random_model(tmp_path / "base", model_type)
    start("sft.py", "--model", base, "--data", real / "sft.json", "--media_root", real, "--out", sft, "--steps", 40,
          "--batch_size", 16, "--tau_steps", 20)  # fmt: skip
    log = read_log(sft)
    for part in ("disc", "gen", "ce_query", "ce_target"):
        first, last = (sum(line[part] for line in lines) / 10 for lines in (log[:10], log[-10:]))
        assert last < first, (part, first, last)
    assert all(line["skipped"] == 0 for line in log)
    start("rl.py", "--model", sft, "--data", real / "rl.json", "--media_root", real, "--out", rl, "--steps", 5,
          "--batch_size", 8, "--max_new_tokens", 48)  # fmt: skip
    log = read_log(rl)
    assert len(log) == 5 and all(math.isfinite(value) for line in log for value in line.values())
    assert log[0]["kl"] == 0 and log[0]["logp_mismatch"] < 1e-4
    start("data.py", "check", real / "sft.json", "--media_root", real, "--model", rl, "--workers", 1)
    (tmp_path / "pairs.json").write_text(json.dumps(json.loads((real / "rl.json").read_text())[:2]))
    start("data.py", "annotate", "--pairs", tmp_path / "pairs.json", "--media_root", real, "--teacher", rl,
          "--max_new_tokens", 8, "--out", tmp_path / "annotated.json")  # fmt: skip
    shutil.unpack_archive(ROOT / "tests/data/mini_mmeb_root.tar.gz", tmp_path)
    table = start("eval.py", "--model", rl, "--root", tmp_path / "mini_mmeb_root", "--tasks", "VOC2007", "HMDB51",
                  "--max_new_tokens", 8, "--samples", 0, "--out", tmp_path / "eval")  # fmt: skip
    assert "VOC2007" in table and "HMDB51" in table
