"""Embedder.embed(): the forms of its inputs, its arguments, and what its results do not depend on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ANSWERS, CLOSE, changed_copy, inputs, picture, scripted, transformers_forward, with_answer

from data import encode_input
from model import Embedder, Prompt


@pytest.mark.parametrize("mode", ["both", "disc", "gen", "traces"])
def test_embed_never_returns_nan(writer_dir, tmp_path, mode):
    """A NaN in an index is found by every query or by none. embed returns zeros and a warning."""
    dead = changed_copy(writer_dir, tmp_path / "dead", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    more = dict(traces=ANSWERS) if mode == "traces" else dict(mode=mode)
    with pytest.warns(UserWarning, match="2 of 2 inputs have an embedding that is not finite"):
        out = Embedder.from_pretrained(dead).embed(["a", "b"], max_new_tokens=4, **more)
    for x in (out.disc, out.gen):
        assert x is None or not x.any()
    assert set(out.skipped) == {0, 1} and "not finite" in out.skipped[0] and (out.valid is None or not out.valid.any())


@pytest.mark.parametrize("more, message", [
    (dict(batch_size=0), "batch_size=0: must be an integer of at least 1"), (dict(samples=0), "samples=0"),
    (dict(samples=-1), "samples=-1"), (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(temperature=-1.0), "temperature=-1.0"), (dict(temperature=float("nan")), "temperature=nan"),
    (dict(traces=["a"]), "1 traces for 2 inputs"), (dict(traces=[]), "0 traces for 2 inputs"),
    (dict(traces={"a": 1, "b": 2}), "not dict"), (dict(samples=2.5), "integer"), (dict(batch_size="3"), "integer"),
    (dict(temperature=1e-40), "temperature=1e-40"), (dict(temperature=1e12), "temperature=1"),
    (dict(samples=True), "samples"), (dict(seed=1.5), "seed"), (dict(seed=-1), "seed"),
    (dict(temperature=True), "temperature"), (dict(max_new_tokens="8"), "max_new_tokens"),
    (dict(mode="generative"), "generative"),
])  # fmt: skip
def test_arguments_of_embed(embedder, more, message):
    """Bug story: batch_size=0 gave zeros for all inputs, without a word."""
    with pytest.raises(ValueError, match=message):
        embedder.embed(["a", "b"], **more)


def test_forms_of_inputs(embedder, tmp_path, monkeypatch):
    """Every form with one sensible meaning works. Bug story: embed("photo.png") embedded these nine letters."""
    picture(0).save(path := tmp_path / "photo.png")
    text, image = embedder.embed([{"text": "a"}, {"images": [str(path)]}], mode="disc").disc
    for given, want in [("a", text), (["a"], text), (("a",), text), ({"text": "a"}, text), (iter(["a"]), text),
                        (path, image), (picture(0), image), ([picture(0)], image), ({"images": str(path)}, image),
                        ({"images": path}, image), ({"images": picture(0)}, image)]:  # fmt: skip
        got = embedder.embed(given, mode="disc").disc
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)
        assert len(got) == 1
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Path"):
        embedder.embed("photo.png")
    none = embedder.embed([])
    assert none.disc.shape == (0, 128) and none.gen.shape == (0, 1, 128) and none.texts == []
    same = embedder.embed([{}, {"text": "", "images": [], "video": []}, {"text": None, "images": None}], mode="disc")
    assert torch.equal(same.disc[0], same.disc[1]) and torch.equal(same.disc[0], same.disc[2])


@pytest.mark.parametrize("given, message", [
    (b"abc", "inputs must be a list of inputs, each .*not bytes"), (np.zeros((4, 4, 3)), "not ndarray"), (3, "not int"),
    (None, "not NoneType"), ([b"abc"], "an input must be .* not bytes"), ([np.zeros((4, 4, 3))], "not ndarray"),
    ([["a"]], "not list"), ([None], "not NoneType"), ([{"text": 3}], "the text must be a string, not int"),
    ({"video": "clip.mp4"}, "ffmpeg -i clip.mp4"), ({"video": ["clip.gif"]}, "ffmpeg"),
    ({"images": ["https://a.org/b.png"]}, "web address. Download"), ("https://a.org/b.png", "text or a file"),
    ([{"images": [["a.png"]]}], "flat list"), ([{"images": [b"x"]}], "holds bytes"),
    ([{"image": "a.png"}], "unknown key 'image'.*text, images, video"), ([{"text": "a <|im_start|>"}], "control token"),
    ([{"text": "\ud83d"}], "surrogate"),
])  # fmt: skip
def test_forms_that_are_refused(embedder, given, message):
    """A sentence with the accepted forms, not a TypeError or zeros."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        embedder.embed(given)


def test_embed_leaves_the_modes_as_they_were(writer_dir):
    """Bug story: embed() put the Embedder and its backbone in train mode."""
    model = Embedder.from_pretrained(writer_dir)
    assert not any(module.training for module in model.modules())
    model.backbone.model.language_model.train()
    before = {name: module.training for name, module in model.named_modules()}
    model.embed(["a"], max_new_tokens=2)
    prompts = [Prompt(0, encode_input(model.tokenizer, {"text": "a"}))]
    next(model.generate(prompts, max_new_tokens=2))  # the rest is not taken
    assert before == {name: module.training for name, module in model.named_modules()}


def test_a_sample_depends_on_content_and_seed_only(writer):
    """Bug stories: the seed was the input's position, and seed=np.int64(3) drew other samples than seed=3."""
    items, sample = inputs(), dict(samples=3, temperature=1.0, seed=5, max_new_tokens=12)
    texts = writer.embed(items, **sample).texts
    assert writer.embed(items[::-1], **sample).texts == texts[::-1]
    assert writer.embed([items[2]], **sample).texts == [texts[2]]
    assert len({tuple(x) for x in texts}) > 1 and writer.embed(items, **(sample | {"seed": 6})).texts != texts
    assert writer.embed(items, **(sample | dict(seed=np.int64(5), temperature=np.float32(1)))).texts == texts
    many = {"samples": np.uint32(6), "batch_size": np.uint32(20), "max_new_tokens": np.uint8(12)}
    assert writer.embed(["a"] * 5, temperature=1.0, **many).valid.shape == (5, 6)  # uint32 minus 1 is 4 billion


def test_pictures_change_the_answer(embedder):
    """Another picture, another order of two pictures, another frame: each gives another embedding."""
    a, b = picture(7), picture(8)
    items = [{"images": [a, b]}, {"images": [b, a]}, {"images": [a, a]}, {"video": [a, b]}, {"video": [b, a]}]
    disc = embedder.embed(items, mode="disc").disc
    assert (torch.pdist(disc) > 1e-3).all()


def test_embed_order_and_batch_size(writer):
    """The results come in the order of the inputs and do not depend on batch_size or on who else is embedded."""
    items = inputs()[::-1] + [{"text": "a much longer text " * 5}, {}]
    big = writer.embed(items, samples=2, temperature=1.0, seed=3, max_new_tokens=16, batch_size=64)
    small = writer.embed(items, samples=2, temperature=1.0, seed=3, max_new_tokens=16, batch_size=2)
    assert big.texts == small.texts and torch.equal(big.valid, small.valid)
    assert torch.equal(big.num_tokens, small.num_tokens)
    torch.testing.assert_close((big.disc, big.gen), (small.disc, small.gen), **CLOSE)
    assert big.disc.shape == (7, 128) and big.gen.shape == (7, 2, 128) and big.valid.shape == (7, 2)
    assert big.disc.dtype == big.gen.dtype == torch.float32
    assert big.valid.any() and (torch.pdist(big.disc) > 1e-4).all()
    for n, item in enumerate(items):
        alone = writer.embed([item], mode="disc")
        torch.testing.assert_close(alone.disc[0], big.disc[n], **CLOSE)
        assert alone.gen is None and alone.texts is None and alone.valid is None


@pytest.mark.parametrize("given", ["traces", "script"])
def test_embed_does_not_depend_on_the_batch(writer, given):
    """Traces and scripted tokens of different lengths give the same embeddings in every batch and order."""
    items = [inputs()[n % 5] | {"text": f"number {n}"} for n in range(8)]
    texts = [f"<think>{'so ' * (n * 7 % 12)}</think><answer>{n}<gen_emb>"[:: -1 if n == 5 else 1] for n in range(8)]
    tokens = [[writer.tokenizer(text).input_ids] for text in texts]

    def embed(order, batch_size):
        some = [items[n] for n in order]
        if given == "traces":
            return writer.embed(some, traces=[texts[n] for n in order], batch_size=batch_size)
        with scripted(writer, [tokens[n] for n in order]):
            return writer.embed(some, batch_size=batch_size)

    want = embed(range(8), 1)
    assert want.valid[:, 0].tolist() == [n != 5 for n in range(8)]
    shuffled = np.random.default_rng(0).permutation(8).tolist()
    for order, batch_size in ((shuffled, 3), (shuffled[::-1], 16)):
        got = embed(order, batch_size)
        torch.testing.assert_close((got.disc, got.gen), (want.disc[order], want.gen[order]), **CLOSE)
        assert torch.equal(got.valid, want.valid[order])
        assert got.texts == [want.texts[n] for n in order] and want.texts[4] == [texts[4]]


@pytest.mark.parametrize("mode", ["both", "disc", "traces"])
def test_bad_inputs_do_not_stop_the_others(writer, tmp_path, mode):
    """Bug story: one unreadable image ended an evaluation after hours. Now .skipped names it, with zeros."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    bad = [{"images": [str(tmp_path / "gone.png")]}, {"text": "x", "images": [str(tmp_path / "broken.png")]},
           {"text": "x <|im_end|>"}, 7, {"image": "a.png"}]  # fmt: skip
    items = [inputs()[1], bad[0], inputs()[0], inputs()[3], *bad[1:]]
    good, skipped = [0, 2, 3], [1, 4, 5, 6, 7]
    more = {"mode": "disc"} if mode == "disc" else {"traces": [ANSWERS[0]] * 8} if mode == "traces" else {}
    more |= {"temperature": 1.0, "max_new_tokens": 12, "batch_size": 2}
    with pytest.warns(UserWarning, match="input 1 is left out.*gone.png"):
        got = writer.embed(items, **more)
    assert sorted(got.skipped) == skipped and "broken.png" in got.skipped[4] and "control token" in got.skipped[5]
    assert not got.disc[skipped].any() and got.disc[good].norm(dim=-1).min() > 0.99
    want = writer.embed([item if n in good else {} for n, item in enumerate(items)], **more)
    torch.testing.assert_close(got.disc[good], want.disc[good], **CLOSE)
    assert want.skipped == {}
    if mode != "disc":
        assert not got.valid[skipped].any() and not got.gen[skipped].any() and not got.num_tokens[skipped].any()
        assert [got.texts[n] for n in (0, 1, 2, 3)] == [want.texts[0], [""], want.texts[2], want.texts[3]]


@pytest.mark.parametrize("traces", [False, True])
def test_embed_reads_the_right_places(writer, traces):
    """disc is the state at the user's <disc_emb>, gen at the assistant's <gen_emb>, both from transformers."""
    items = inputs()
    texts = [ANSWERS[n % 2] for n in range(5)] if traces else None
    for blank in (True, False):
        got = writer.embed(items, max_new_tokens=24, blank_image=blank, traces=texts, batch_size=3)
        assert got.valid.any()
        for n, item in enumerate(items):
            row = encode_input(writer.tokenizer, item, blank_image=blank, family=writer.family)
            assert len(row.grids) == len(item.get("images", [])) + ("video" in item) + (blank and n == 0)
            answer = writer.tokenizer(got.texts[n][0]).input_ids
            with torch.no_grad():
                states = F.normalize(transformers_forward(writer, [with_answer(row, answer)])[0][0], dim=-1)
            place = row.ids.tolist().index(writer.disc_id)
            torch.testing.assert_close(got.disc[n], states[place], **CLOSE)
            if got.valid[n, 0]:
                at = row.n_prompt + max(t for t, token in enumerate(answer) if token == writer.gen_id)
                torch.testing.assert_close(got.gen[n, 0], states[at], **CLOSE)
            else:
                assert not got.gen[n].any()


def test_texts_can_be_read_back_as_traces(writer):
    """What embed() wrote can be given back as traces and yields the same embeddings."""
    items = [x for n, x in enumerate(inputs()) if n != 2]
    first = writer.embed(items, max_new_tokens=24)
    again = writer.embed(items, traces=[texts[0] for texts in first.texts])
    assert first.valid.any() and torch.equal(first.valid, again.valid)
    torch.testing.assert_close((first.disc, first.gen), (again.disc, again.gen), **CLOSE)


def test_fused_is_one_dot_product_for_both_cosines(writer):
    """[disc, gen] / sqrt(2): its dot product is the mean of the cosines. Other modes have no fused."""
    items = [{"text": text} for text in ("what", "a star", "a ring", "a moon")]
    traces = [ANSWERS[0], ANSWERS[1], "no embedding", ANSWERS[0]]
    got = writer.embed(items, traces=traces)
    fused, width = got.fused[:, 0], writer.width
    cosines = (got.disc @ got.disc.T + got.gen[:, 0] @ got.gen[:, 0].T) / 2
    torch.testing.assert_close(fused @ fused.T, cosines)
    assert fused.shape == (4, 2 * width) and fused.dtype == torch.float32
    assert not fused[2, width:].any() and fused[2, :width].norm() == pytest.approx(0.5**0.5, abs=1e-6)
    assert (fused @ fused[2]).argsort().tolist() == (got.disc @ got.disc[2]).argsort().tolist()
    sampled = writer.embed(items, samples=3, temperature=1.0, max_new_tokens=12)
    assert sampled.fused.shape == (4, 3, 2 * width)
    torch.testing.assert_close(sampled.fused[:, 1, width:] * 2**0.5, sampled.gen[:, 1])
    assert writer.embed(items, mode="disc").fused is None
    assert writer.embed(items, mode="gen", max_new_tokens=4).fused is None


@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_bf16_is_close(writer, writer_dir, kind):
    """Bug story: the rotated keys are fp32 and the cache bf16, so the first decoded token was a dtype error."""
    want = writer.embed(inputs(), traces=[ANSWERS[0]] * 5)
    model = Embedder.from_pretrained(writer_dir, dtype=torch.bfloat16 if kind == "weights" else torch.float32)
    model.bf16 = kind == "autocast"
    got = model.embed(inputs(), traces=[ANSWERS[0]] * 5)
    assert got.disc.dtype == torch.float32
    assert not torch.equal(got.disc, want.disc)
    assert F.cosine_similarity(got.disc, want.disc).min() > 0.99
    assert F.cosine_similarity(got.gen[:, 0], want.gen[:, 0]).min() > 0.99
    decoded = model.embed(inputs(), max_new_tokens=24)
    again = model.embed(inputs(), traces=[texts[0] for texts in decoded.texts])  # without a cache
    assert decoded.valid.any() and torch.equal(decoded.valid, again.valid)
    both = decoded.valid[:, 0]
    assert F.cosine_similarity(decoded.disc, want.disc).min() > 0.99
    assert F.cosine_similarity(decoded.gen[both, 0], again.gen[both, 0]).min() > 0.99
