"""The decode step of support/decode.py against transformers' own, and what surrounds it: slots and prefills.
Run: pytest tests/test_decode.py"""

import pytest
import torch
from conftest import MODELS, encoded, generate_all, inputs, random_backbone, scripted, transformers_read
from torch.nn.functional import rms_norm

import model as model_file
from model import Embedder, Prompt, PromptQueue
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
    """bf16 over fp32 weights rounds as transformers does under autocast. Bug story: Qwen3's norms of queries and keys
    were rounded between norm and rotation, and log-probabilities were off by 0.009 instead of 0.0003."""
    backbone = random_backbone(model_type)
    fuse_norms(backbone)
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda norm, x: rms_norm(x.float(), norm.weight.shape,
                                                                              norm.weight, norm.eps))  # fmt: skip
    exact = run_steps(backbone, torch.float32)
    theirs = run_steps(backbone, torch.bfloat16, transformers_read(backbone, bf16=True))
    ours = run_steps(backbone, torch.bfloat16)
    assert (ours - theirs).norm() < 0.05 * (theirs - exact).norm() < 0.005 * exact.norm()


def test_rollouts_equal_those_of_transformers_step(writer, monkeypatch):
    """All sampled tokens of a seeded rollout are the same, with prompts of all kinds that enter and leave the slots."""
    rows = encoded(writer, inputs(), answered=False)
    settings = dict(G=3, temperature=1.0, max_new_tokens=24, slots=6)
    ours = generate_all(writer, rows, **settings)
    monkeypatch.setattr(Decoder, "run", transformers_read(writer.backbone))
    theirs = generate_all(writer, rows, **settings)
    assert len({tuple(ids) for r in ours.values() for ids in r.ids}) > 6
    for n in ours:
        assert ours[n].ids == theirs[n].ids
        torch.testing.assert_close(ours[n].gen, theirs[n].gen, **CLOSE)


def test_added_rows_and_keys_change_nothing(writer, monkeypatch):
    """What a GPU does for its graphs: a step of more rows (token 0 into free slots) and of more keys than there are."""
    rows = encoded(writer, inputs(), answered=False)
    settings = dict(G=3, temperature=1.0, max_new_tokens=24, slots=8)
    plain = generate_all(writer, rows, **settings)
    real, sizes = Decoder.run, set()

    def padded(self, given, K):
        A = given.shape[1]
        R = min(self.slots, 1 << (A - 1).bit_length())
        sizes.add((A, R))
        return real(self, torch.nn.functional.pad(given, (0, R - A)), self.cache.capacity)[:A]

    monkeypatch.setattr(Decoder, "run", padded)
    again = generate_all(writer, rows, **settings)
    assert any(R > A for A, R in sizes)
    for n in plain:
        assert again[n].ids == plain[n].ids
        torch.testing.assert_close(again[n].gen, plain[n].gen, **CLOSE)


def test_prefill_in_parts_changes_nothing(writer, monkeypatch):
    """--prefill_tokens bounds a pass over prompts; a longer prompt goes alone. The results stay the same."""
    rows = encoded(writer, inputs(), answered=False)
    whole = generate_all(writer, rows, G=2, max_new_tokens=16, slots=10)
    passes, real = [], Decoder.begin_prefill

    def counted(self, *given, **more):
        passes.append(0)
        return real(self, *given, **more)

    monkeypatch.setattr(Decoder, "begin_prefill", counted)
    parts = generate_all(writer, rows, G=2, max_new_tokens=16, slots=10, prefill_tokens=60)
    assert len(passes) > 2
    for n in whole:
        assert parts[n].ids == whole[n].ids
        torch.testing.assert_close(parts[n].gen, whole[n].gen, **CLOSE)


def test_reading_ahead_changes_nothing(writer, monkeypatch):
    """Waiting rows move into a free slot with their keys and values, with fewer prefills and steps. Story: in 8 slots
    each prompt had a pass of its own, a quarter slower at 90 tokens."""
    rows = encoded(writer, inputs(), answered=False) * 4
    lengths = [3 + 5 * n % 11 for n in range(len(rows))]  # different ones, so that the order of the rows changes
    script = [[[7] * n + [writer.gen_id]] for n in lengths]
    prefill, step = Decoder.begin_prefill, Decoder.step
    caches, decoded = [], []  # of each prefill its cache, of each step its number of rows

    def counted_prefill(self, *given, **more):
        caches.append(prefill(self, *given, **more))
        return caches[-1]

    def counted_step(self, tokens, *given):
        decoded.append(len(tokens))
        return step(self, tokens, *given)

    monkeypatch.setattr(Decoder, "begin_prefill", counted_prefill)
    monkeypatch.setattr(Decoder, "step", counted_step)
    monkeypatch.setattr(model_file, "AHEAD", 0)
    plain = generate_all(writer, rows, script=script, slots=4)
    assert caches[0].slots == 4
    plain_prefills = len(caches)
    plain_steps = len(decoded)
    caches.clear()
    decoded.clear()
    monkeypatch.setattr(model_file, "AHEAD", 2)
    ahead = generate_all(writer, rows, script=script, slots=4)
    assert caches[0].slots == 6
    assert len(caches) < plain_prefills / 1.5
    assert len(decoded) < plain_steps
    for n in range(len(rows)):
        assert ahead[n].ids == plain[n].ids == script[n]
        for name in ("disc", "gen"):
            torch.testing.assert_close(getattr(ahead[n], name), getattr(plain[n], name), **CLOSE)


def test_waiting_prompts_are_taken_up_to_a_number_of_tokens(writer):
    """Padded tokens count, one prompt always goes, and none is lost or taken twice."""
    rows = encoded(writer, inputs(), answered=False)
    lengths = [len(row.ids) for row in rows]
    unreadable = Prompt("bad", None, problem="no such file")
    given = iter([Prompt(n, row) for n, row in enumerate(rows)] + [unreadable])
    waiting = PromptQueue(given, "cpu")
    assert [p.key for p in waiting.take(9, 1)] == [0]
    two = max(lengths[1:3])
    assert [p.key for p in waiting.take(9, 2 * two)] == [1, 2]
    assert [p.key for p in waiting.take(1, 10_000)] == [3]
    assert waiting.take(0, 10_000) == []
    assert next(given).key == 4, "a prompt was read that nobody had asked for"
    assert [p.key for p in waiting.take(9, 10_000)] == ["bad"]
    assert waiting.take(9, 10_000) == []


def test_step_casts_no_weight(writer_dir, monkeypatch):
    """In bf16 the fp32 weights are rounded once per generate(). Bug stories: autocast's cache takes no frozen weight,
    so a frozen model cast all of them in every step. The loop's autocast leaked to its caller."""
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
