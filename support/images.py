"""Images: open, check and convert them, cut them into patches, and hash their files."""





import hashlib
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from support.backbones import QWEN2_VL
from support.distributed import gather_objects, processes
from support.program import Progress, Skip, Stopped

NUM_FRAMES = 8  # of a video

BLANK_SIZE = (28, 28)  # of the white picture that stands for "no picture": images/blank.jpg in the published files

MAX_DECODED = 200_000_000  # pixels; a larger picture is refused before it is decoded (decompression bombs)


def open_picture(source, root=None, is_frame=False):
    """A path (relative to root) or a PIL picture -> PIL picture, decoded, in RGB. Raises Skip with file and reason.

    The border for media: whatever a decoder raises on a broken file, and decoders raise anything, is a Skip. Memory
    errors and interrupts pass. The EXIF orientation is ignored, and an image with several frames or pages shows its
    first one, as in the official loader. is_frame: the source is one frame of a video and must hold one image only.
    """
    name = getattr(source, "filename", "") or "a picture given as an object"
    try:
        picture = source
        if not isinstance(source, Image.Image):
            name = Path(root or "", source)
            path = find_picture(source, root)
            if path is None:
                return blank_picture()
            picture = Image.open(path)
        check_size(picture, name)
        if is_frame and picture.format not in PREVIEWS and getattr(picture, "n_frames", 1) > 1:
            raise Skip(f"{name}: holds {picture.n_frames} images where one frame of a video must be. Save each of them "
                       "as a file and list these files")  # fmt: skip
        rescale_transparency(picture)
        picture.load()  # Image.open reads the header only: a truncated file shows here
        return to_rgb(picture)
    except (Skip, MemoryError, KeyboardInterrupt, SystemExit, Stopped):
        raise
    except BaseException as error:  # noqa: BLE001 (a decoder's panic is no Exception)
        reason = str(error) or type(error).__name__
        raise Skip(f"{name}: cannot be read as a picture ({reason})") from error


PREVIEWS = ("MPO", "PSD")  # the further images of these formats are previews or layers of the first one


def find_picture(source, root=None):
    """The path of a picture's file; None for the authors' stand-in for "no picture", which need not be there.

    Raises Skip where the path is no file below root. A link that lies there may point anywhere; a pipe is no file:
    opening it would wait for ever.
    """
    path = Path(root or "", source)
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long
        raise Skip(f"{path}: cannot be read as a picture ({error.strerror})") from error
    if path.name == "blank.jpg" and not exists:
        return None
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root or path)):
        raise Skip(f"{source}: the path leaves --media_root {root}")
    if not exists:
        raise Skip(f"{path}: no such file{hint_of_absent(path, root)}")
    if not path.is_file():
        raise Skip(f"{path}: cannot be read as a picture (it is no file)")
    return path


def hint_of_absent(path, root):
    """What may be wrong with a path that does not exist, as the end of a sentence."""
    for form in ("NFC", "NFD"):
        if os.path.exists(unicodedata.normalize(form, str(path))):
            return (f"; one that looks the same exists, its name is in Unicode form {form} and this one is not. Write "
                    f"the path in form {form}, or rename the file")  # fmt: skip
    return " (is --media_root right?)" if root else ""


def hash_media(paths, root=None, group=None):
    """Return {path: hash of the bytes of the file, or of the blank image in its place}, "" if there is no such file.
    The ranks share the files, which all of them must see; group: the process group that they meet in."""
    rank, world = processes()
    paths = sorted(paths, key=str)
    local_paths = paths[rank::world]
    bar = Progress(total=len(local_paths), desc="read media", unit="file", disable=rank > 0 or len(paths) < 10_000)
    digests = {}
    with ThreadPoolExecutor(16) as threads, bar:
        for path, digest in zip(local_paths, threads.map(partial(digest_of_file, root=root), local_paths)):
            digests[path] = digest
            bar.update(1)
    for part in gather_objects(digests, group):
        digests |= part
    return digests


def digest_of_file(path, root=None):
    try:
        found = find_picture(path, root)
        if found is None:
            return hashlib.blake2b(blank_picture().tobytes(), digest_size=16).hexdigest()
        with open(found, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except (Skip, OSError):  # open_picture will say why
        return ""


def rescale_transparency(picture):
    """Pillow reads PNGs of 2, 4 and 16 bits as 8 bits, and leaves the transparent colour as the file has it."""
    rawmode = picture.tile[0].args if picture.format == "PNG" and picture.tile else ""
    factor = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(rawmode)
    colour = picture.info.get("transparency")
    if factor and colour is not None:
        scaled = tuple(int(value * factor) for value in np.atleast_1d(colour))
        picture.info["transparency"] = scaled if len(scaled) > 1 else scaled[0]


def check_size(picture, name):
    """Raises Skip for a picture that is too large to be decoded, empty, or too narrow for the model's resize."""
    width, height = picture.size
    size = f"{width} x {height} pixels"
    if width * height > MAX_DECODED:
        raise Skip(f"{name}: {size} is above the bound of {MAX_DECODED:,}")
    if min(width, height) == 0 or max(width, height) > 200 * min(width, height):
        raise Skip(f"{name}: {size}: empty, or one side is more than 200 times the other")


def to_rgb(picture):
    """8-bit RGB with transparent places white, as in transformers; convert() alone shows what colour lies beneath."""
    premultiplied = {"La": "LA", "RGBa": "RGBA"}
    if picture.mode in premultiplied:  # convert() knows this one way only
        picture = picture.convert(premultiplied[picture.mode])
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):  # Pillow's PPM: 0..65535
        picture = grey_of_8_bits(picture)
    if picture.mode in ("I", "F"):
        raise ValueError(f"its 32-bit pixels (mode {picture.mode}) have no known range; save it with 8 or 16 bits")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def grey_of_8_bits(picture):
    """Grey of 16 bits, scaled by its range; convert() cuts it off at 255, so that nearly all of it is white. So is
    what a PNG declares as transparent."""
    tags = getattr(picture, "tag_v2", {})  # of a TIFF: 258 bits per sample, 262 is 0 where white is
    bits = tags.get(258, (16,))[0]
    top = 2**bits - 1
    values = np.asarray(picture)
    grey = np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8)
    if tags.get(262) == 0:
        grey = 255 - grey
    grey[values == picture.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)


def thinned(frames, n=NUM_FRAMES):
    """At most n of the frames, evenly spread, first and last included."""
    places = np.linspace(0, len(frames) - 1, min(len(frames), n)).astype(int)
    return [frames[i] for i in places]


def blank_picture():
    """The white picture (one token) that stands on sides without media."""
    return Image.new("RGB", BLANK_SIZE, "white")


def patch_bytes(frames, min_pixels, max_pixels, family=QWEN2_VL):
    """The patches before they are normalised: numpy uint8 [n, patch_values], grid [3]."""
    frames = [open_picture(frame) for frame in frames]
    width, height = frames[0].size
    H, W = smart_resize(height, width, family.token_side, min_pixels, max_pixels)
    pixels = [np.asarray(frame.resize((W, H), Image.Resampling.BICUBIC)) for frame in frames]
    lacking = -len(pixels) % family.depth
    pixels += pixels[-1:] * lacking

    patch, depth, merge = family.patch, family.depth, family.merge
    t = len(pixels) // depth
    h = H // patch
    w = W // patch
    x = np.stack(pixels)  # [t * depth, H, W, 3]
    x = x.reshape(t, depth, h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # the patches of a token follow each other; in one: channel, frame, y, x
    x = x.reshape(t * h * w, family.patch_values)
    return np.ascontiguousarray(x), np.array([t, h, w])


def normalise(patches, family=QWEN2_VL):
    """uint8 [n, patch_values] -> float32, on the device they are on: until then a page of 2.4 M pixels is 14 MB, not
    57."""
    table = byte_to_float(family.mean, family.std, patches.device)
    channels = []
    for c, values in enumerate(patches.int().chunk(3, dim=1)):
        channels.append(table[:, c][values])
    return torch.cat(channels, dim=1)


@cache
def byte_to_float(mean, std, device):
    """The normalised value of every possible byte, [256, 3], in the order of transformers' float32 arithmetic."""
    scaled = (np.arange(256)[:, None] * (1 / 255)).astype(np.float32)
    return torch.from_numpy((scaled - np.float32(mean)) / np.float32(std)).to(device)
