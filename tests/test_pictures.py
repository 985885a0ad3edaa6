"""Picture files: which are read, as what, and which are refused with a sentence."""

import os
import struct
import warnings
import zlib

import numpy
import pytest
import torch
from PIL import EpsImagePlugin, Image

from ridfr_core.pictures import EXTENSIONS, PictureError, read_image
from ridfr_core.training.photos import find_photos, load_photo

SIZE = 64
RAMP = numpy.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE)


@pytest.mark.parametrize("name, values", [
    ("16.png", (RAMP * 65535).astype("uint16")),
    ("16.tif", (RAMP * 65535).astype("uint16")),
    ("big-endian.tif", (RAMP * 65535).astype(">u2")),
    ("32.tif", (RAMP * 65535).astype("int32")),
    ("float.tif", RAMP.astype("float32")),
    ("8.png", (RAMP * 255).round().astype("uint8")),
])
@pytest.mark.parametrize("read", [read_image, lambda path: load_photo(path, SIZE)])
def test_grey_of_any_depth_is_read_whole(tmp_path, name, values, read):
    mode = "I;16B" if values.dtype == ">u2" else None
    picture = Image.frombytes(mode, (SIZE, SIZE), values.tobytes()) if mode else Image.fromarray(values)
    picture.save(tmp_path / name)
    found = read(tmp_path / name)
    assert found.shape == (3, SIZE, SIZE) and (found - torch.from_numpy(RAMP)).abs().max() < 1 / 250


@pytest.mark.parametrize("values, message", [
    (numpy.full((SIZE, SIZE), numpy.nan, "float32"), "its values go from nan to nan, but must lie between 0 and 1"),
    (numpy.full((SIZE, SIZE), 255.0, "float32"), "its values go from 255 to 255, but must lie between 0 and 1"),
    (numpy.full((SIZE, SIZE), -numpy.inf, "float32"), "its values go from -inf to -inf"),
    (numpy.full((SIZE, SIZE), 70000, "int32"), "its values go from 70000 to 70000, but must lie between 0 and 65535"),
])
def test_values_out_of_range_are_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(PictureError, match=f"The picture '.*x.tif' cannot be used: {message}"):
        read_image(tmp_path / "x.tif")


def half_transparent(mode):
    """Red on the left; on the right red again, which nobody sees."""
    pixels = numpy.zeros((SIZE, SIZE, 4), "uint8")
    pixels[..., 0] = 255
    pixels[:, : SIZE // 2, 3] = 255
    picture = Image.fromarray(pixels)
    return picture.quantize(8) if mode == "P" else picture.convert(mode)


@pytest.mark.parametrize("mode, red", [("RGBA", (1, 0, 0)), ("P", (1, 0, 0)), ("LA", (76 / 255,) * 3)])
def test_what_is_transparent_lies_on_white(tmp_path, mode, red):
    half_transparent(mode).save(tmp_path / "t.png")
    found = read_image(tmp_path / "t.png")
    assert found[:, 0, 0].tolist() == pytest.approx(red, abs=0.01)
    assert found[:, 0, -1].tolist() == [1, 1, 1]


def test_a_colour_that_stands_for_transparent(tmp_path):
    Image.new("RGB", (SIZE, SIZE), (0, 255, 0)).save(tmp_path / "t.png", transparency=(0, 255, 0))
    assert read_image(tmp_path / "t.png").min() == 1


@pytest.mark.parametrize("mode, name", [("CMYK", "x.jpg"), ("CMYK", "x.tif"), ("P", "x.png"), ("1", "x.png"),
                                        ("YCbCr", "x.jpg"), ("L", "x.webp"), ("RGB", "x.bmp")])
def test_other_modes_are_read_as_their_colours(tmp_path, mode, name):
    grey = Image.new("RGB", (SIZE, SIZE), "white" if mode == "1" else (200, 200, 200))
    (grey.quantize(4) if mode == "P" else grey.convert(mode)).save(tmp_path / name)
    assert (read_image(tmp_path / name) - (1 if mode == "1" else 200 / 255)).abs().max() < 0.03


def test_a_photo_is_upright_and_of_several_the_first(tmp_path):
    tall = Image.new("RGB", (SIZE, 2 * SIZE), "black")
    exif = Image.Exif()
    exif[0x0112] = 6
    tall.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, SIZE, 2 * SIZE)
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    for name in ("several.png", "several.tif", "several.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert read_image(tmp_path / name)[0].min() > 0.9


def test_a_phones_photo_of_several_pictures_is_a_jpeg(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.jpg")[0].min() > 0.9


def png_of(width, height):
    """A PNG of black in a few bytes, which says that it is of this size."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, height, message", [
    (10_000, 10_000, "it has 10000x10000 pixels, more than 89,478,485"),  # Pillow warns
    (20_000, 20_000, "it has more than 89,478,485 pixels"),  # Pillow refuses
    (1, 1, "it has 1x1 pixels, and each side must have at least 16"),
    (0, 64, "cannot be used: it"),
    (16, 3200, "it has 16x3200 pixels, more than 16 times as long as wide"),
])
def test_too_many_and_too_few_pixels_are_refused_before_they_are_decoded(tmp_path, width, height, message):
    (tmp_path / "x.png").write_bytes(png_of(width, height))
    with pytest.raises(PictureError, match=message):
        read_image(tmp_path / "x.png")


def test_postscript_is_not_handed_to_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it was"))
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(PictureError, match="it is not an image"):
        read_image(tmp_path / "x.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are Unix's")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(PictureError, match="it is not a file"):
        read_image(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore")  # Pillow's, of TIFF tags
def test_any_damage_is_a_sentence(tmp_path):
    """Some bytes of each format changed, or its end cut off: read all the same, or refused."""
    chance, refused = numpy.random.default_rng(0), 0
    picture = Image.fromarray(chance.integers(0, 255, (SIZE, SIZE, 3), numpy.uint8))
    for extension in sorted(EXTENSIONS):
        path = tmp_path / f"x{extension}"
        picture.save(path)
        whole = path.read_bytes()
        for _ in range(40):
            spoilt = bytearray(whole)
            for place in chance.integers(0, min(200, len(whole)), 3):
                spoilt[place] = chance.integers(0, 256)
            path.write_bytes(spoilt[: chance.integers(1, len(whole))] if chance.random() < 0.3 else spoilt)
            try:
                assert read_image(path).isfinite().all()
            except PictureError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 50


def test_warnings_stay_as_they_are(tmp_path):
    for i in range(24):
        Image.fromarray(numpy.full((SIZE, SIZE, 3), i, numpy.uint8)).save(tmp_path / f"{i}.png")
    before = list(warnings.filters)
    find_photos(tmp_path, SIZE, tmp_path / "cache")
    assert warnings.filters == before
