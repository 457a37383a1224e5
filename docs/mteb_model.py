"""An UME-R1 model in MTEB (`pip install mteb`, 2.x): texts and pictures, by disc, or by gen or fused with reasoning.

    PYTHONPATH=. python docs/mteb_model.py runs/2b/rl fused VidoreArxivQARetrieval
"""

import sys

import mteb
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder

from model import Embedder
from support.settings import weights_digest


class UMEModel(AbsEncoder):
    def __init__(self, folder, mode="fused", max_new_tokens=512, batch_size=8):
        where = {"device": "cuda", "dtype": torch.bfloat16} if torch.cuda.is_available() else {}
        self.embedder = Embedder.from_pretrained(folder, **where)
        self.mode = mode
        self.settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        # mteb takes a stored score of the same name and revision: both must say all that decides it
        name = f"{str(folder).strip('/').replace('/', '-')}-{mode}"
        if mode != "disc":
            name += f"-{max_new_tokens}"
        meta = {"name": f"ume/{name}", "revision": weights_digest(folder), "modalities": ["text", "image"]}
        self.mteb_model_meta = ModelMeta.create_empty(meta)

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **_):
        """inputs: batches as dicts of lists -> float32 [N, D], fused [N, 2D]. A query follows the instruction."""
        is_document = prompt_type is not None and prompt_type.value == "document"
        instruction = "" if is_document else self.get_instruction(task_metadata, prompt_type)
        items = []
        for batch in inputs:
            for row in zip(*(batch[key] for key in ("text", "image") if key in batch)):
                text, images = (row[0], row[1:]) if "text" in batch else ("", row)
                items.append({"text": f"{instruction}\n{text}", "images": [image for image in images if image]})
        out = self.embedder.embed(items, mode="both" if self.mode == "fused" else self.mode, **self.settings)
        return out.disc if self.mode == "disc" else getattr(out, self.mode)[:, 0]


if __name__ == "__main__":
    print(mteb.evaluate(UMEModel(*sys.argv[1:3]), mteb.get_tasks(tasks=sys.argv[3:])).to_dataframe())
