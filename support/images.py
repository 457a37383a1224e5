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
from support.program import BadInput, Progress, Skip, Stopped

NUM_FRAMES = 8  # of a video

BLANK_SIZE = (28, 28)  # pixels of the white image that means "no image": images/blank.jpg in the published files

MAX_DECODED = 200_000_000  # pixels; a larger image raises Skip before it is decoded, against decompression bombs


def open_image(source, root=None, is_frame=False):
    """Return the decoded RGB image of a path (relative to root) or of a PIL image.

    An unreadable image raises Skip with the file and the reason. Decoders raise all kinds of exceptions on a broken
    file, and all of them become a Skip, except memory errors and interrupts. As in the official loader, the EXIF
    orientation is ignored, and a file with several frames or pages gives the first one. is_frame: the source is one
    frame of a video, and its file must hold only one image.
    """
    name = getattr(source, "filename", "") or "an image given as an object"
    try:
        image = source
        if not isinstance(source, Image.Image):
            name = Path(root or "", source)
            path = find_image(source, root)
            if path is None:
                return white_image()
            image = Image.open(path)
        check_size(image, name)
        if is_frame and image.format not in PREVIEWS and getattr(image, "n_frames", 1) > 1:
            raise Skip(f"{name}: holds {image.n_frames} images, but one frame of a video must be one image. Save each "
                       "image as a file and list these files")  # fmt: skip
        rescale_transparency(image)
        image.load()  # Image.open reads only the header, so a truncated file raises here
        return to_rgb(image)
    except (Skip, MemoryError, KeyboardInterrupt, SystemExit, Stopped):
        raise
    except BaseException as error:  # noqa: BLE001 (a decoder's panic is not an Exception)
        reason = str(error) or type(error).__name__
        raise Skip(f"{name}: cannot be read as an image ({reason})") from error


PREVIEWS = ("MPO", "PSD")  # in these formats, the other images are previews or layers of the first image


def find_image(source, root=None):
    """Return the path of an image's file, or None for a missing blank.jpg, which means "no image".

    Raises Skip if the path is not a file below root. A link below root may point anywhere. A pipe does not count as a
    file, because opening it would block forever.
    """
    path = Path(root or "", source)
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long
        raise Skip(f"{path}: cannot be read as an image ({error.strerror})") from error
    if path.name == "blank.jpg" and not exists:
        return None
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root or path)):
        raise Skip(f"{source}: the path leaves --media_root {root}")
    if not exists:
        hint = " (is --media_root right?)" if root else ""
        for form in ("NFC", "NFD"):
            if os.path.exists(unicodedata.normalize(form, str(path))):
                hint = (f"; a file with the same visible name exists, but its name is in Unicode form {form}. Write "
                        f"the path in form {form}, or rename the file")  # fmt: skip
        raise Skip(f"{path}: no such file{hint}")
    if not path.is_file():
        raise Skip(f"{path}: cannot be read as an image (it is not a file)")
    return path


def hash_media(paths, root=None, group=None):
    """Return {path: hash of the file's bytes}, "" for a missing file. A missing blank.jpg has the blank image's hash.
    The ranks divide the files among them, so every rank must see all files. group: the process group of the ranks."""
    rank, world = processes()
    paths = sorted(paths, key=str)
    own_paths = paths[rank::world]
    bar = Progress(total=len(own_paths), desc="read media", unit="file", disable=rank > 0 or len(paths) < 10_000)
    digests = {}
    with ThreadPoolExecutor(16) as threads, bar:
        for path, digest in zip(own_paths, threads.map(partial(digest_of_file, root=root), own_paths)):
            digests[path] = digest
            bar.update(1)
    for part in gather_objects(digests, group):
        digests |= part
    return digests


def refuse_most_missing(paths, digests, where, cure):
    """Raise BadInput if most of the paths have no digest. A few missing files are skipped rows or misses. Most of them
    missing means a wrong folder, and hours of wasted work."""
    absent = sorted(path for path in paths if not digests[path])
    if len(absent) > len(paths) / 2:
        raise BadInput(f"{where}: {len(absent)} of {len(paths)} media files do not exist, e.g. {absent[0]}. {cure}.")


def digest_of_file(path, root=None):
    try:
        found = find_image(path, root)
        if found is None:
            return hashlib.blake2b(white_image().tobytes(), digest_size=16).hexdigest()
        with open(found, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except (Skip, OSError):  # open_image will report the reason
        return ""


def rescale_transparency(image):
    """Scale a PNG's transparent colour to 8 bits. Pillow scales pixels of 2, 4 and 16 bits, but not this colour."""
    rawmode = image.tile[0].args if image.format == "PNG" and image.tile else ""
    factor = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(rawmode)
    colour = image.info.get("transparency")
    if factor and colour is not None:
        scaled = tuple(int(value * factor) for value in np.atleast_1d(colour))
        image.info["transparency"] = scaled if len(scaled) > 1 else scaled[0]


def check_size(image, name):
    """Raise Skip for an image that is too large to decode, empty, or too narrow for the model's resize."""
    width, height = image.size
    size = f"{width} x {height} pixels"
    if width * height > MAX_DECODED:
        raise Skip(f"{name}: {size} is above the limit of {MAX_DECODED:,}. Save the image at a smaller size")
    if min(width, height) == 0 or max(width, height) > 200 * min(width, height):
        raise Skip(f"{name}: {size}: the image is empty, or one side is more than 200 times the other")


def to_rgb(image):
    """Return 8-bit RGB with transparent pixels white, as in transformers. convert() alone shows their hidden colour."""
    premultiplied = {"La": "LA", "RGBa": "RGBA"}
    if image.mode in premultiplied:  # convert() has only this conversion for these modes
        image = image.convert(premultiplied[image.mode])
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # Pillow's PPM: 0..65535
        image = grey_of_8_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"its 32-bit pixels (mode {image.mode}) have no known range. Save it with 8 or 16 bits")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def grey_of_8_bits(image):
    """Scale 16-bit grey by its range to 8 bits, and make the transparent value of a PNG white. convert() alone clips
    at 255, so nearly all pixels become white."""
    tags = getattr(image, "tag_v2", {})  # TIFF tags: 258 is the bits per sample; 262 is 0 if white is stored as 0
    bits = tags.get(258, (16,))[0]
    top = 2**bits - 1
    values = np.asarray(image)
    grey = np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8)
    if tags.get(262) == 0:
        grey = 255 - grey
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)


def thinned(frames, n=NUM_FRAMES):
    """Return at most n frames, evenly spaced, with the first and the last frame."""
    indices = np.linspace(0, len(frames) - 1, min(len(frames), n)).astype(int)
    return [frames[i] for i in indices]


def white_image():
    """Return the white image (one token) that a query or target without media gets."""
    return Image.new("RGB", BLANK_SIZE, "white")


def patch_bytes(frames, min_pixels, max_pixels, family=QWEN2_VL):
    """Return the patches before normalisation, numpy uint8 [n, patch_values], and the grid [3]."""
    frames = [open_image(frame) for frame in frames]
    width, height = frames[0].size
    H, W = smart_resize(height, width, family.token_side, min_pixels, max_pixels)
    pixels = [np.asarray(frame.resize((W, H), Image.Resampling.BICUBIC)) for frame in frames]
    missing = -len(pixels) % family.depth
    pixels += pixels[-1:] * missing

    patch, depth, merge = family.patch, family.depth, family.merge
    t = len(pixels) // depth
    h = H // patch
    w = W // patch
    x = np.stack(pixels)  # [t * depth, H, W, 3]
    x = x.reshape(t, depth, h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # a token's patches are adjacent; inside a patch: channel, frame, y, x
    x = x.reshape(t * h * w, family.patch_values)
    return np.ascontiguousarray(x), np.array([t, h, w])


def normalise(patches, family=QWEN2_VL):
    """Normalise uint8 patches [n, patch_values] to float32 on their device. As uint8, a page of 2.4 M pixels takes
    14 MB instead of 57 MB."""
    table = byte_to_float(family.mean, family.std, patches.device)
    channels = []
    for c, values in enumerate(patches.int().chunk(3, dim=1)):
        channels.append(table[:, c][values])
    return torch.cat(channels, dim=1)


@cache
def byte_to_float(mean, std, device):
    """Return the normalised value of every byte, [256, 3], with the operation order of transformers' float32."""
    scaled = (np.arange(256)[:, None] * (1 / 255)).astype(np.float32)
    return torch.from_numpy((scaled - np.float32(mean)) / np.float32(std)).to(device)
