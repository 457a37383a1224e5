"""The settings of the scripts: ranges of flags, and which changes a resumed run may have."""

import sys

import pytest

import eval as ev
import rl
import sft
import support.settings as settings_file
from support.program import BadInput


@pytest.mark.parametrize("module, flag, value", [
    (sft, "keep", -1), (sft, "keep", 0), (sft, "save_every", 0), (sft, "pass_tokens", 0), (sft, "batch_size", 0),
    (sft, "steps", 0), (sft, "lr", -1), (sft, "lr", "nan"), (sft, "tau", 0), (sft, "warmup", 2),
    (sft, "max_skipped", -1), (sft, "workers", -1), (sft, "beta2", 1), (sft, "seed", -1), (rl, "G", 1),
    (rl, "temperature", 0), (rl, "keep", -1), (rl, "temperature", "inf"), (rl, "slots", 0),
    (rl, "max_new_tokens", 0), (rl, "eps_low", 1.5), (ev, "samples", -1),
    (ev, "slots", 0), (ev, "max_new_tokens", 0), (ev, "temperature", -1), (ev, "save_every", 0),
    (ev, "video_max_pixels", 10),
])  # fmt: skip
def test_flags_out_of_their_range(module, flag, value, tmp_path, monkeypatch):
    """Bug story: --keep -1 deleted every checkpoint, --G 1 trained without reward, --temperature 0 ended as NaN."""
    more = ["--root", str(tmp_path), "--tasks", "x"] if module is ev else []
    monkeypatch.setattr(sys, "argv", ["x.py", f"--{flag}", str(value), "--out", str(tmp_path / "out"), *more])
    with pytest.raises(BadInput, match=f"--{flag} {value}[.0]*: must be (at least|above)"):
        module.main()
    assert not (tmp_path / "out").exists()


def test_every_number_has_its_range():
    """A new setting cannot be forgotten in the table."""
    bounded = {name for *_, names in settings_file.BOUNDS for name in names.split()}
    for module in (sft, rl, ev):
        for field in module.Settings.__dataclass_fields__.values():
            assert field.type not in ("int", "float", int, float) or field.name in bounded, field.name


def test_a_run_from_before_a_setting_existed_goes_on(capsys):
    """A new flag must not make older runs unresumable: its default is what they did; the change is said."""
    settings_file.refuse_changed({"lr": 1.0, "G": 8}, {"lr": 1.0, "G": 8, "new": "x"}, "runs/old")
    assert "new None -> x" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="G 8 -> 4"):
        settings_file.refuse_changed({"G": 8}, {"G": 4, "new": "x"}, "runs/old")
