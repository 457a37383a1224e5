"""The decode step of support/decode.py against transformers' own, and what surrounds it: slots and prefills."""

import pytest
import torch
from conftest import MODELS, encoded, generate_all, inputs, random_backbone, scripted, transformers_read
from torch.nn.functional import rms_norm

import model as model_file
from model import Embedder, Prompt
from support import decode
from support.backbones import fuse_norms
from support.decode import Decoder

CLOSE = dict(rtol=1e-5, atol=1e-5)


@torch.no_grad()
def run_steps(backbone, dtype, read=None, seed=0):
    """Two prompts of 5 and 3 tokens in 2 slots each, then 6 steps that the fourth row leaves after 3 -> all states."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(backbone, 4, dtype)
    if read:
        decoder.run = lambda *given: read(decoder, *given)
    ids = torch.randint(10, 300, (2, 5), generator=generator)
    backbone.model.language_model(
        inputs_embeds=backbone.get_input_embeddings()(ids),
        position_ids=torch.arange(5).expand(3, 2, -1),
        past_key_values=decoder.begin_prefill(0, 2, 2, length=5),
        use_cache=True,
    )
    states, lengths, positions = [], [5, 5, 3, 3], [9, 9, 3, 3]
    for step in range(6):
        A = 4 if step < 3 else 3
        tokens = torch.randint(10, 300, (A,), generator=generator).tolist()
        index = [n + step for n in lengths[:A]]
        states.append(decoder.step(tokens, index, [n + step for n in positions[:A]]))
    return torch.cat(states)


@pytest.mark.parametrize("model_type", MODELS)
def test_step_equals_transformers(model_type):
    """The states of every step are transformers' for all families, with rows of different lengths and positions."""
    backbone = random_backbone(model_type)
    want = run_steps(backbone, torch.float32, transformers_read(backbone))
    got = run_steps(backbone, torch.float32)
    assert want.std(0).mean() > 0.1, "the case needs rows that differ"
    torch.testing.assert_close(got, want, **CLOSE)


def test_large_weights_are_not_copied(monkeypatch):
    """Weights that need no rounding are used where they are, and the states are the same."""
    backbone = random_backbone("qwen2_vl")
    want = run_steps(backbone, torch.float32)
    theirs = {p.data_ptr() for p in backbone.parameters()}
    monkeypatch.setitem(decode.COPIED, "cpu", 0)
    decoder = Decoder(backbone, 1, torch.float32)
    assert decoder.head.weights[0].data_ptr() in theirs
    for layer in decoder.layers:
        for projection in (layer.qkv, layer.o, layer.gate_up, layer.down):
            assert {weight.data_ptr() for weight in projection.weights} <= theirs
    torch.testing.assert_close(run_steps(backbone, torch.float32), want, **CLOSE)


@pytest.mark.parametrize("model_type", MODELS)
def test_bf16_step_rounds_as_autocast(model_type, monkeypatch):
    """Bug story: Qwen3's norms of queries and keys were rounded too early, which moved log p by 0.009."""
    backbone = random_backbone(model_type)
    fuse_norms(backbone)
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda norm, x: rms_norm(x.float(), norm.weight.shape,
                                                                              norm.weight, norm.eps))  # fmt: skip
    exact = run_steps(backbone, torch.float32)
    theirs = run_steps(backbone, torch.bfloat16, transformers_read(backbone, bf16=True))
    ours = run_steps(backbone, torch.bfloat16)
    assert (ours - theirs).norm() < 0.05 * (theirs - exact).norm() < 0.005 * exact.norm()


def assert_same_rollouts(got, want):
    for n in want:
        assert got[n].ids == want[n].ids
        for name in ("disc", "gen"):
            torch.testing.assert_close(getattr(got[n], name), getattr(want[n], name), **CLOSE)


def test_rollouts_equal_those_of_other_steps(writer, monkeypatch):
    """The same tokens with transformers' step, and with added rows and keys, as a GPU's graphs have."""
    rows = encoded(writer, inputs(), answered=False)
    settings = dict(G=3, temperature=1.0, max_new_tokens=24, slots=8)
    ours = generate_all(writer, rows, **settings)
    assert len({tuple(ids) for r in ours.values() for ids in r.ids}) > 6
    real, sizes = Decoder.run, set()

    def padded(self, given, K):
        A = given.shape[1]
        R = min(self.slots, 1 << (A - 1).bit_length())
        sizes.add((A, R))
        return real(self, torch.nn.functional.pad(given, (0, R - A)), self.cache.capacity)[:A]

    for run in (transformers_read(writer.backbone), padded):
        monkeypatch.setattr(Decoder, "run", run)
        assert_same_rollouts(generate_all(writer, rows, **settings), ours)
    assert any(R > A for A, R in sizes)


def test_reading_ahead_changes_nothing(writer, monkeypatch):
    """Waiting rows move into a free slot, with fewer prefills and steps. --pass_tokens only adds prefills."""
    rows = encoded(writer, inputs(), answered=False) * 4
    lengths = [3 + 5 * n % 11 for n in range(len(rows))]  # different ones, so that the order of the rows changes
    script = [[[7] * n + [writer.gen_id]] for n in lengths]
    prefill, step = Decoder.begin_prefill, Decoder.step
    found = []  # per run its rollouts, the slots of each prefill's cache, the number of rows of each step

    def counted_prefill(self, *given, **more):
        cache = prefill(self, *given, **more)
        found[-1][1].append(cache.slots)
        return cache

    def counted_step(self, tokens, *given):
        found[-1][2].append(len(tokens))
        return step(self, tokens, *given)

    monkeypatch.setattr(Decoder, "begin_prefill", counted_prefill)
    monkeypatch.setattr(Decoder, "step", counted_step)
    for ahead, more in ((0, {}), (2, {}), (2, dict(pass_tokens=60))):
        monkeypatch.setattr(model_file, "AHEAD", ahead)
        found.append(({}, [], []))
        found[-1][0].update(generate_all(writer, rows, script=script, slots=4, **more))
    (plain, plain_slots, plain_steps), (ahead, slots, steps), (parts, parts_slots, _) = found
    assert plain_slots[0] == 4 and slots[0] == 6
    assert len(slots) < len(plain_slots) / 1.5 and len(steps) < len(plain_steps) and len(slots) < len(parts_slots)
    assert [plain[n].ids for n in range(len(rows))] == script
    for other in (ahead, parts):
        assert_same_rollouts(other, plain)


def test_step_casts_no_weight(writer_dir, monkeypatch):
    """Bug stories: a frozen model cast all weights in every step. The loop's autocast leaked to its caller."""
    model, largest = Embedder.from_pretrained(writer_dir), []  # largest: numbers of the largest cast of each step
    model.bf16 = True
    rows = encoded(model, inputs()[:2], answered=False)
    real = Decoder.run

    def counted(*given):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            out = real(*given)
        copies = [e for e in profile.events() if e.name == "aten::_to_copy"]
        largest.append(max(int(torch.tensor(e.input_shapes[0]).prod()) for e in copies))
        return out

    monkeypatch.setattr(Decoder, "run", counted)
    for trained in (True, False):
        model.requires_grad_(trained)
        with scripted(model, [[[5] * (n + 2)] for n in range(2)], lambda prompt: prompt.key):
            for _, r in model.generate([Prompt(n, row) for n, row in enumerate(rows)], slots=2):
                ones = torch.ones(1, 2)
                assert torch.nn.functional.linear(ones, ones).dtype == r.disc.dtype == torch.float32
    smallest_weight = model.backbone.model.language_model.layers[0].self_attn.k_proj.weight.numel()
    assert len(largest) == 6 and max(largest) < smallest_weight
    assert not torch.is_autocast_enabled("cpu")
