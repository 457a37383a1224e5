"""Images and videos: patches against transformers, transparency, 16 bits, animated and broken files."""

import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image, ImageOps, ImageSequence
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import support.program as program_file
from data import BadInput, encode, encode_input, patchify
from support.annotate import opened
from support.files import read_rows
from support.images import open_image, white_image
from support.program import MissingFile, Skip


def official(image, low, high):
    """Patches and grid of one picture from transformers."""
    out = Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high})([image], return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"][0]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("size", [(28, 28), (57, 1999), (13, 40), (70, 56), (211, 300)])
def test_patchify_equals_transformers(mode, size):
    """The patches of a picture are exactly those of transformers' processor, for every mode and odd sizes."""
    image = picture(1, *size, mode=mode)
    x, grid = patchify([image], min_pixels=784, max_pixels=60_000)
    want, want_grid = official(image, 784, 60_000)
    assert torch.equal(grid, want_grid) and x.dtype == torch.float32 and torch.equal(x, want)


def test_large_and_extreme_images():
    """A photo scaled down to the upper bound is exact too. Sides of more than 200 to 1 cannot be resized: a Skip with
    the size."""
    tiles = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(tiles.repeat(40, 0).repeat(40, 1))
    x, grid = patchify([image], min_pixels=784, max_pixels=100_000)
    assert torch.equal(x, official(image, 784, 100_000)[0]) and int(grid.prod()) * 196 <= 100_000
    assert patchify([Image.new("RGB", (28 * 200, 28))], min_pixels=784, max_pixels=10**6)[1].tolist() == [1, 2, 400]
    with pytest.raises(Skip, match="2020 x 10"):
        patchify([Image.new("RGB", (2020, 10))], min_pixels=784, max_pixels=10**6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparency_shows_white(mode):
    """Bug story: convert("RGB") drops the alpha channel and shows the colour beneath, mostly black. transformers shows
    white."""
    image = picture(0, 60, 60)
    if mode in ("RGBA", "LA"):
        image.putalpha(picture(1, 60, 60, "L"))
        image = image.convert(mode)
    elif mode == "P":
        image = image.quantize(16)
        image.info["transparency"] = 3
    else:
        image = image.convert(mode)
        image.info["transparency"] = image.getpixel((5, 5))
    want = official(image, 784, 10**6)[0]
    opaque = Image.fromarray(np.asarray(image.convert("RGB")))
    assert not torch.equal(want, official(opaque, 784, 10**6)[0])  # or the case would test nothing
    assert torch.equal(patchify([image], min_pixels=784, max_pixels=10**6)[0], want)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_video_layout(n):
    """Patch (t, y, x) has frames 2t and 2t + 1, each as transformers' processor alone. The first frame sets the size,
    and an odd count repeats the last one."""
    frames = [picture(k, 84, 56) for k in range(n)]
    frames[-1] = picture(9, 50, 40) if n > 1 else frames[0]
    x, grid = patchify(frames, min_pixels=784, max_pixels=25_088)
    assert grid.tolist() == [(n + 1) // 2, 4, 6]
    x = x.view((n + 1) // 2, 24, 3, 2, 196)
    for k in range(2 * ((n + 1) // 2)):
        frame = frames[min(k, n - 1)].resize((84, 56), Image.Resampling.BICUBIC)
        want = official(frame, 784, 25_088)[0].view(24, 3, 2, 196)
        assert torch.equal(x[k // 2, :, :, k % 2], want[:, :, 0])


def test_pixel_bounds_and_frames(embedder):
    """Images keep up to 2,359,296 pixels, frames are cut to 25,088. Ten frames are thinned to eight, ends included. The
    stand-in for a missing image is white and costs one token."""
    tokenizer = embedder.tokenizer
    wide = encode(tokenizer, {"text": "<image>", "images": [Image.new("RGB", (560, 280))], "video": []})
    assert wide.grids.tolist() == [[1, 20, 40]]
    frames = [Image.new("RGB", (560, 280), (k, 0, 0)) for k in range(10)]
    film = encode(tokenizer, {"text": "<video>", "images": [], "video": frames})
    assert film.grids[0, 0] == 4 and 3136 <= film.grids[0, 1:].prod() * 196 <= 25_088
    red = film.patches.reshape(4, -1, 3, 2, 196)[:, 0, 0, :, 0].flatten()  # bytes until they are on the GPU
    assert red.tolist() == [0, 1, 2, 3, 5, 6, 7, 9] and red.dtype == np.uint8
    assert encode(tokenizer, {"text": "<video>", "images": [], "video": [picture(0)]}).grids[0, 0] == 1
    x, grid = patchify([white_image()], min_pixels=784, max_pixels=2_359_296)
    assert grid.tolist() == [1, 2, 2] and len(x.unique()) == 3
    ids = encode_input(tokenizer, {"text": "a"}).ids
    assert (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum() == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "SGI",
                                  "TGA", "PCX", "DDS"])  # fmt: skip
def test_broken_files_never_end_the_run(tmp_path, kind):
    """Changed or truncated files of every format open or raise a Skip with their name. No decoder's own error ends the
    run."""
    path, rng, skipped = tmp_path / "x.img", np.random.default_rng(0), 0
    try:
        picture(0, 48, 48, "P" if kind == "GIF" else "RGB").save(path, kind)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow cannot write {kind}")
    whole = path.read_bytes()
    for k in range(80):
        content = bytearray(whole)
        for at in rng.integers(0, min(len(content), 200) if k % 4 else len(content), 3):
            content[at] = rng.integers(256)
        path.write_bytes(content[: rng.integers(1, len(content) + 1)] if k % 2 else content)
        try:
            patchify([open_image(path)], min_pixels=784, max_pixels=10_000)
        except Skip as skip:
            skipped += 1
            assert "x.img" in str(skip)
    assert skipped > 5


class Failing(Image.Image):
    """A picture whose decoder raises what it is told to."""

    def load(self):
        raise self.error


Panic = type("Panic", (BaseException,), {})  # as decoders in Rust raise


@pytest.mark.parametrize("error", [RuntimeError("a"), NotImplementedError("b"), AttributeError("c"), KeyError("d"),
                                   Panic("e"), AssertionError(), ZeroDivisionError("f")])  # fmt: skip
def test_whatever_a_decoder_raises_is_a_skip(error):
    """Bug story: one changed byte in an AVIF raised a RuntimeError, which ended embed, eval --check and every start of
    a run. The end that a signal or the memory asks for is no Skip: once a run read on after its signal."""
    broken = Failing()
    broken._mode, broken._size, broken.error, broken.filename = "RGB", (30, 30), error, "x.avif"
    with pytest.raises(Skip, match="x.avif: cannot be read as an image"):
        open_image(broken)
    for passes in (MemoryError(), KeyboardInterrupt(), SystemExit(), program_file.Stopped("SIGTERM", 143)):
        broken.error = passes
        with pytest.raises(type(passes)):
            open_image(broken)


def test_odd_files_are_skips(tmp_path):
    """An image of 0 pixels, a pipe and a very thin image are skips with the file's name."""
    pipe, thin = tmp_path / "pipe.png", tmp_path / "thin.png"
    os.mkfifo(pipe)
    Image.new("RGB", (2010, 10)).save(thin)
    for image, message in ((Image.new("RGB", (0, 5)), "empty"), (pipe, str(pipe)), (thin, str(thin))):
        with pytest.raises(Skip, match=message):
            open_image(image)


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_colours(mode):
    """They are rounded, so a value may differ by one."""
    straight = picture(0, 40, 40, "L" if mode == "La" else "RGB")
    straight.putalpha(picture(1, 40, 40, "L"))
    got = np.asarray(open_image(straight.convert(mode))).astype(int)
    assert np.abs(got - np.asarray(open_image(straight))).max() <= 1


@pytest.mark.parametrize("mode, ending", [("I;16", "png"), ("I;16", "tiff"), ("I;16B", "tiff"), ("I", "pgm"),
                                          ("I", "tiff"), ("F", "tiff")])  # fmt: skip
def test_sixteen_bits_keep_their_content(tmp_path, mode, ending):
    """Bug story (Pillow#2574): convert() cuts 16-bit grey off at 255, so a scan is white and its negative too. A ramp
    is the same ramp in 8 bits, and its inverse the inverse. An image of unknown range is a Skip."""
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(32, 0)
    eight = np.linspace(0, 255, 64).round().astype(int)
    path = tmp_path / f"ramp.{ending}"
    for values, want in ((ramp, eight), (65535 - ramp, 255 - eight)):
        big_endian = values.astype(">u2").tobytes()
        if ending == "pgm":
            path.write_bytes(b"P5 64 32 65535\n" + big_endian)
        elif mode == "I;16B":
            Image.frombytes("I;16B", (64, 32), big_endian).save(path)
        else:
            dtype = {"F": np.float32, "I": np.int32}.get(mode, np.uint16)
            Image.fromarray((values / 65535 if mode == "F" else values).astype(dtype)).save(path)
        if ending == "tiff" and mode in "IF":
            with pytest.raises(Skip, match="ramp.tiff.*no known range"):
                open_image(path)
            continue
        assert Image.open(path).mode.startswith("I")
        got = np.asarray(open_image(path)).astype(int)
        assert np.abs(got - want[None, :, None]).max() <= 1


@pytest.mark.parametrize("bits, white_is_zero", [(12, False), (16, True)])
def test_odd_tiffs_keep_their_content(bits, white_is_zero):
    """12 bits were nearly black, and a scan whose white is zero was its negative. Pillow writes neither, so an image in
    memory gets the tags of such a file."""
    ramp = np.linspace(0, 2**bits - 1, 64).round().astype(np.uint16)[None].repeat(32, 0)
    image = Image.fromarray(ramp)
    image.tag_v2 = {258: (bits,), 262: 0 if white_is_zero else 1}
    want = np.linspace(0, 255, 64)
    got = np.asarray(open_image(image)).astype(int)[0, :, 0]
    assert np.abs(got - (255 - want if white_is_zero else want)).max() <= 1


def test_orientation_is_left_to_the_user(tmp_path):
    """EXIF orientation is ignored, as in the official loader and in training; one line of Pillow makes it upright."""
    image, path = picture(0, 60, 30), tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    assert open_image(path).size == (60, 30)
    assert open_image(ImageOps.exif_transpose(Image.open(path))).size == (30, 60)


def animated(path, **more):
    """Write an animated file of three colours."""
    first, *others = (Image.new("RGB", (60, 60), colour) for colour in ("red", "green", "blue"))
    first.save(path, save_all=True, append_images=others, **more)
    return path


@pytest.mark.parametrize("bits, samples, transparent, want", [
    (1, [0, 0, 0, 0, 1, 1, 1, 1], 0, [255] * 8),
    (2, [0, 1, 2, 3], 1, [0, 255, 170, 255]),
    (4, [5, 6], 5, [255, 102]),
    (8, [5, 6], 5, [255, 6]),
    (16, [1000, 1001, 30000, 65535], 1000, [255, 4, 117, 255]),
    (16, [[0x1234, 0x2345, 0x3456], [0x3434, 0x4545, 0x5656]], [0x1234, 0x2345, 0x3456],
     [[255] * 3, [0x34, 0x45, 0x56]]),
])  # fmt: skip
def test_a_transparent_colour_of_any_depth_is_white(tmp_path, bits, samples, transparent, want):
    """Bug story: grey of 16 bits lost its transparency (4 in place of 255, white), and so did grey of 2 and 4 bits.
    With colours of 16 bits another colour was transparent. By the PNG specification tRNS has the file's depth."""
    text = "".join(format(x, f"0{bits}b") for x in np.ravel(samples))
    row = int(text, 2).to_bytes(len(text) // 8, "big")
    colour_type = 2 if np.ndim(samples[0]) else 0
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", len(samples), 2, bits, colour_type, 0, 0, 0)),
              (b"tRNS", b"".join(struct.pack(">H", x) for x in np.atleast_1d(transparent))),
              (b"IDAT", zlib.compress((b"\0" + row) * 2)), (b"IEND", b"")]  # fmt: skip
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in chunks]  # fmt: skip
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    got = np.asarray(open_image(tmp_path / "x.png"))[0]
    assert got.tolist() == (np.array(want) if np.ndim(want[0]) else np.array(want)[:, None].repeat(3, 1)).tolist()


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_an_animated_file_is_no_frame(embedder, tmp_path, ending):
    """Bug stories: an animated file as a frame of a video gave its first frame silently. As a frame it is a Skip. As an
    image it shows its first frame, as Pillow's open() does. ImageSequence.Iterator yields one object again and again,
    so a list of it has one frame many times. A still image may be repeated on purpose."""
    path = animated(tmp_path / f"clip.{ending}", **({"lossless": True} if ending == "webp" else {}))
    with pytest.raises(Skip, match=rf"clip.{ending}: holds 3 images, but one frame of a video must be one"):
        encode_input(embedder.tokenizer, {"video": [picture(0), Image.open(path)]})
    with pytest.raises(Skip, match="holds 3 images"):
        opened({"text": "", "images": [], "video": [str(path)]}, None)
    with Image.open(path) as first:
        assert np.array_equal(np.asarray(open_image(path)), np.asarray(first.convert("RGB")))
    copies = [frame.copy() for frame in ImageSequence.Iterator(Image.open(path))]
    assert len(encode_input(embedder.tokenizer, {"video": copies}).grids) == 1
    frames = list(ImageSequence.Iterator(Image.open(path)))
    for kind in ("video", "images"):
        with pytest.raises(BadInput, match=rf"{kind} is one object 3 times.*frame.copy\(\)"):
            encode_input(embedder.tokenizer, {kind: frames})
        encode_input(embedder.tokenizer, {kind: [picture(0)] * 3})
def test_what_is_said_of_a_missing_file(tmp_path):
    """Bug stories: embed and eval.py asked about --media_root, which they do not have, and annotate and check about
    --data. An é in one character (Linux) and in two (a Mac) look equal, and "no such file" was all that was said."""
    with pytest.raises(Skip, match=r"gone.png: no such file$"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(Skip, match=r"gone.png: no such file \(is --media_root right\?\)"):
        open_image("gone.png", tmp_path)
    with pytest.raises(MissingFile, match=f"gone.json: no such file. Relative paths start from {Path.cwd()}$"):
        read_rows("gone.json")
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        picture(0).save(tmp_path / unicodedata.normalize(form, f"{form}\u00e9.png"))
        with pytest.raises(Skip, match=f"no such file; a file with the same visible name.* Unicode form {form}. Write"):
            open_image(unicodedata.normalize(other, f"{form}\u00e9.png"), tmp_path)
