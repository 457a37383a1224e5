"""Model folders: check them, load them completely or raise, and save them as transformers reads them."""

import contextlib
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from support.backbones import FAMILIES, family_of
from support.files import read_json
from support.formats import DISC, GEN
from support.program import BadInput, MissingFile


def check_model(name_or_path):
    """Raise BadInput if a path is no model folder, because transformers would look it up as a hub id."""
    path = Path(name_or_path)
    if not path.is_dir() and (str(path).count("/") != 1 or path.parent.is_dir()):
        raise MissingFile(f"{path} is no model folder. sft.py writes the model of rl.py, both those of eval.py.")
    if not path.is_dir():
        return
    if (path / "meta.json").exists():
        raise BadInput(f"{path} is a checkpoint. Make a model folder with: python data.py export {path} --out DIR")
    if adapters := sorted(file.name for file in path.glob("adapter_*")):
        raise BadInput(f"{path} holds an adapter ({', '.join(adapters)}), which is not supported. Merge it into the "
                       "weights first, with peft's merge_and_unload() and save_pretrained().")  # fmt: skip
    if not (path / "config.json").exists():
        raise MissingFile(f"{path}: config.json is missing. Give the output folder of a finished stage.")


def load_tokenizer(name_or_path):
    """Return the tokenizer of a model. Check it, because transformers silently returns an empty one if files miss."""
    check_model(name_or_path)
    with told_of(name_or_path):
        config, tokenizer = AutoConfig.from_pretrained(name_or_path), AutoTokenizer.from_pretrained(name_or_path)
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise BadInput(f"{name_or_path}: model family {config.model_type} is unknown. This code reads {known}. Each "
                       "is a record of FAMILIES in support/backbones.py; add another record there.")  # fmt: skip
    check_config(config, name_or_path)
    family = family_of(config)
    vision = config.vision_config
    sizes = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    if sizes != (family.patch, family.depth, family.merge):
        raise BadInput(f"{name_or_path}: its patch sizes {sizes} are not those of {config.model_type}. Add a record of "
                       "its own to support/backbones.py.")  # fmt: skip
    pads = tokenizer.convert_tokens_to_ids([family.image_pad, family.video_pad])
    if pads != [config.image_token_id, config.video_token_id]:
        raise BadInput(f"{name_or_path}: its tokenizer is not the model's (the image tokens differ from config.json). "
                       "Check that tokenizer.json and tokenizer_config.json are complete.")  # fmt: skip
    if tokenizer(family.image_pad, add_special_tokens=False).input_ids[-1] != config.image_token_id:
        raise BadInput(f"{name_or_path}: its tokenizer splits control tokens such as {family.image_pad} into letters. "
                       'Remove "split_special_tokens" from tokenizer_config.json.')  # fmt: skip
    return tokenizer


@contextlib.contextmanager
def told_of(name_or_path):
    """Turn any error of transformers' loading into BadInput with its message."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{name_or_path}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error


def check_config(config, name_or_path):
    """Raises BadInput if config.json asks for something that this code would compute wrongly."""
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method", "unknown method")
        raise BadInput(f"{name_or_path}: the weights are quantised ({method}). This code computes with plain weights. "
                       "Give the folder or hub id of the model in bf16 or fp32.")  # fmt: skip
    text = config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    section = (text.rope_parameters or {}).get("mrope_section", [])
    if 2 * sum(section) != head:
        raise BadInput(f"{name_or_path}: config.json has mrope_section {section}, whose sum is not half of a head's "
                       f"{head} values. Copy config.json again.")  # fmt: skip
    rope = text.rope_parameters.get("rope_type", "default")
    unknown = []
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        unknown.append("layers with sliding attention")
    if text.hidden_act != "silu":
        unknown.append(f"hidden_act {text.hidden_act}")
    if rope in ("dynamic", "longrope"):  # their angles depend on the length
        unknown.append(f"rope_type {rope}")
    if unknown:
        raise BadInput(f"{name_or_path}: config.json has {', '.join(unknown)}. The decode step (support/decode.py) "
                       "does not compute this, so its answers would be wrong. Choose another model, or extend that "
                       "file.")  # fmt: skip


def load_family(name_or_path):
    """The Family of a model that load_tokenizer() has accepted."""
    return family_of(AutoConfig.from_pretrained(name_or_path))


def load_pretrained(name_or_path, dtype):
    """Return (tokenizer, backbone), or raise BadInput if a tensor is missing, extra or of another shape. transformers
    fills missing tensors with random numbers and ignores extra ones. Only a head that is tied to the token embeddings
    may be missing."""
    tokenizer = load_tokenizer(name_or_path)
    with told_of(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path)
        config.text_config.attention_dropout = 0.0  # the families have no other dropout; saved folders have 0 too
        config.return_dict = config.text_config.return_dict = True
        backbone, found = getattr(transformers, family_of(config).model_class).from_pretrained(
            name_or_path, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    tied = {"lm_head.weight"} if backbone.config.tie_word_embeddings else set()
    wrong = [*(set(found["missing_keys"]) - tied), *(str(key[0]) for key in found["mismatched_keys"])]
    if wrong:
        raise BadInput(f"{name_or_path}: {len(wrong)} tensors of the model are missing or have another shape: "
                       f"{', '.join(sorted(wrong)[:5])}{', ..' * (len(wrong) > 5)}. Copy it again.")  # fmt: skip
    if extra := sorted(found["unexpected_keys"]):
        raise BadInput(f"{name_or_path}: the model of config.json does not have {len(extra)} tensors of the files: "
                       f"{', '.join(extra[:5])}{', ..' * (len(extra) > 5)}. Copy config.json again.")  # fmt: skip
    return tokenizer, backbone


def add_embedding_tokens(backbone, tokenizer):
    """Add <gen_emb>, then <disc_emb>, as ordinary tokens. Their rows start as copies of two unused rows (official)."""
    sources = {GEN: "<|object_ref_end|>", DISC: "<|object_ref_start|>"}
    missing = [token for token in (GEN, DISC) if token not in tokenizer.get_vocab()]
    if not missing:
        return
    tokenizer.add_tokens(missing)  # ordinary: they survive decoding with skip_special_tokens
    if len(tokenizer) > backbone.get_input_embeddings().weight.shape[0]:
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for token in missing:
            new, old = tokenizer.convert_tokens_to_ids([token, sources[token]])
            for weight in (backbone.get_input_embeddings().weight, backbone.lm_head.weight):  # the same tensor if tied
                weight[new] = weight[old]


def add_keys_of_transformers_4(path):
    """Write some keys of a saved folder also under their names in transformers 4 (tested by hand with 4.57.6), for
    engines that still use it. Without these keys, transformers 4 uses its defaults: another rotary base, untied heads,
    other image sizes. transformers 5 ignores these keys."""
    files = [Path(path, f"{name}.json") for name in ("config", "tokenizer_config", "preprocessor_config")]
    config, tokenizer, images = (read_json(file) for file in files)
    text = config["text_config"]
    rope = dict(text["rope_parameters"])
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    text["tie_word_embeddings"] = config["tie_word_embeddings"]
    if "extra_special_tokens" in tokenizer:
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    images |= {"min_pixels": images["size"]["shortest_edge"], "max_pixels": images["size"]["longest_edge"]}
    for file, content in zip(files, (config, tokenizer, images)):
        file.write_text(json.dumps(content, indent=2) + "\n")
