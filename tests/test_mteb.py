"""docs/mteb_model.py in MTEB: a retrieval task that is made here gets the score of our own dot products. It is skipped
where mteb is not installed, because mteb is no requirement."""

import shutil
import sys

import pytest
import torch
from conftest import ROOT, picture
from safetensors.torch import load_file, save_file

mteb = pytest.importorskip("mteb", reason="mteb is not installed")
datasets = pytest.importorskip("datasets")
sys.path.insert(0, str(ROOT / "docs"))


def retrieval_task(queries, pages):
    """Query n looks for page n. queries: texts; pages: pictures."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Pages(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Pages", description="of a test", dataset={"path": "none/none", "revision": "1"},
            type="Any2AnyRetrieval", modalities=["text", "image"], category="t2i",
            eval_splits=["test"], eval_langs=["eng-Latn"], main_score="hit_rate_at_1",
            prompt={"query": "Find the page."},
        )  # fmt: skip

        def load_data(self, **_):
            corpus = datasets.Dataset.from_list([{"id": f"d{n}", "image": page} for n, page in enumerate(pages)])
            asked = datasets.Dataset.from_list([{"id": f"q{n}", "text": text} for n, text in enumerate(queries)])
            relevant = {f"q{n}": {f"d{n}": 1} for n in range(len(queries))}
            split = {"corpus": corpus, "queries": asked, "relevant_docs": relevant, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Pages()


@pytest.mark.parametrize("mode", ["disc", "gen", "fused"])
def test_mteb_sees_our_dot_products(writer, writer_dir, mode, tmp_path):
    from mteb_model import UMEModel

    queries, pages = [f"page {n}" for n in range(6)], [picture(n) for n in range(6)]
    task = retrieval_task(queries, pages)
    model = UMEModel(writer_dir, mode, max_new_tokens=12)
    result = mteb.evaluate(model, task, cache=None)
    (scores,) = result.task_results[0].scores["test"]

    def embed(items):
        out = writer.embed(items, max_new_tokens=12)
        return out.disc if mode == "disc" else getattr(out, mode)[:, 0]

    scores_of = embed([f"Find the page.\n{query}" for query in queries]) @ embed([{"images": [p]} for p in pages]).T
    hits = (scores_of.argmax(1) == torch.arange(6)).float().mean()
    assert scores["hit_rate_at_1"] == pytest.approx(float(hits), abs=1e-4)


def test_other_weights_are_not_the_stored_score(writer_dir, tmp_path):
    """Bug story (mteb#842): other weights under the same path, or another mode, got the score of the old ones."""
    from mteb.cache import ResultCache
    from mteb_model import UMEModel

    path = shutil.copytree(writer_dir, tmp_path / "model")
    task = retrieval_task(["page 0", "page 1"], [picture(0), picture(1)])
    asked = []  # one entry for each call of the model's encode

    def score(mode="disc", **settings):
        model = UMEModel(path, mode, **settings)
        model.encode = lambda *given, real=model.encode, **more: asked.append(1) or real(*given, **more)
        before = len(asked)
        mteb.evaluate(model, task, cache=ResultCache(tmp_path / "cache"))
        return len(asked) > before

    assert score() and not score(), "the same model is not asked again"
    assert score("gen", max_new_tokens=4) and score("gen", max_new_tokens=8)
    tensors = load_file(path / "model.safetensors")
    save_file({name: x * 2 for name, x in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    assert score(), "other weights are asked"
