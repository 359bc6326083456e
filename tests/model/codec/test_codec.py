"""Codec: valid JSON values and files become rows, invalid ones raise a CodecError, and rendered rows parse back."""

import base64
import json
import pickle
import resource
import struct
import subprocess
import sys
import time
import urllib.parse
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concord.model.codec import CodecError, Limits, array_from_image, parse, parse_bytes, render
from concord.model.modality import (
    BinaryModality,
    CategoricalModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
    check_array,
)

DIGIT = ImageModality(name="digit", channels=1, height=28, width=28)
PHOTO = ImageModality(name="photo", channels=3, height=32, width=32)
WORD = TextModality(name="word", length=8, alphabet=" abcdefghijklmnopqrstuvwxyz")
SENSOR = VectorModality(name="sensor", size=3, mean=(0.0, 1.0, 2.0), std=(1.0, 2.0, 4.0))
TRAITS = BinaryModality(name="traits", attributes=("red", "a/b"))
TITLE = TextModality(name="title", length=4, unit="word", vocabulary=("blue", "cup"))
BRAND = CategoricalModality(name="brand", classes=("acme", "Zenith"))
YEAR = CategoricalModality(name="year", classes=("2011", "2012", "0.5", "-1"))
WEIGHT = VectorModality(name="weight", size=1, mean=(10.0,), std=(2.0,))
NEW = BinaryModality(name="new", attributes=("new",))
SCAN = ImageModality(name="scan", channels=2, height=2, width=3)
MODALITIES = [DIGIT, PHOTO, WORD, SENSOR, TRAITS, TITLE, BRAND, SCAN, YEAR, WEIGHT, NEW]

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def file(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def scene(width: int, height: int) -> Image.Image:
    """A smooth image without symmetry: rotations, crops and swapped channels change it."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    return Image.fromarray(np.stack([red, green, (red + green) / 4], axis=-1).astype(np.uint8))


def codec_error(modality: Modality, value: object, limits: Limits | None = None) -> CodecError:
    parser: Any = parse_bytes if isinstance(value, bytes) else parse
    with pytest.raises(CodecError) as caught:
        parser(modality, value, limits or Limits())
    assert caught.value.detail == str(caught.value) != ""
    return caught.value


STORED = {  # EXIF orientation -> how the camera transposes the upright image before it stores it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class TestImages:
    @pytest.mark.parametrize("image_format", ["png", "webp"])
    @pytest.mark.parametrize("modality", [DIGIT, PHOTO], ids=lambda m: m.name)
    def test_render_lossless_format_parses_back_exactly(self, modality: ImageModality, image_format: Any) -> None:
        levels = np.random.default_rng(0).integers(0, 256, modality.shape)
        row = (levels / 255).astype(np.float32)
        value = render(modality, row, image_format=image_format)
        assert (value["media_type"], value["width"], value["height"]) == (
            f"image/{image_format}",
            modality.width,
            modality.height,
        )
        parsed = parse(modality, value["data"])
        np.testing.assert_array_equal(np.rint(parsed * 255), levels)
        np.testing.assert_array_equal(parse(modality, {k: value[k] for k in ("data", "media_type")}), parsed)
        assert render(modality, parsed, image_format=image_format) == value

    def test_render_image_has_no_metadata(self) -> None:
        with Image.open(BytesIO(base64.b64decode(render(PHOTO, np.zeros(PHOTO.shape, np.float32))["data"]))) as image:
            assert image.info == {}

    def test_render_out_of_range_values_are_clipped(self) -> None:
        row = np.full(DIGIT.shape, 1.5, np.float32)
        row[0, 0, 0] = -0.5
        parsed = parse(DIGIT, render(DIGIT, row)["data"])
        assert parsed[0, 0, 0] == 0
        assert parsed[0, 1, 1] == 1

    def test_render_raw_contains_the_array(self) -> None:
        row = np.random.default_rng(0).random(PHOTO.shape, dtype=np.float32)
        value = render(PHOTO, row, image_format="raw")
        assert (value["shape"], value["dtype"]) == ([3, 32, 32], "float32")
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(value["data"]), "<f4").reshape(PHOTO.shape), row)

    @pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
    @pytest.mark.parametrize("form", ["base64", "url", "object", "bytes"])
    def test_parse_all_forms_of_all_formats_give_the_same_row(self, image_format: str, form: str) -> None:
        content = file(scene(32, 32), image_format)
        with Image.open(BytesIO(content)) as image:
            expected = np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / np.float32(255)
        if form == "bytes":
            row = parse_bytes(PHOTO, content)
        else:
            row = parse(
                PHOTO,
                {
                    "base64": b64(content),
                    "url": f"data:image/{image_format.lower()};base64,{b64(content)}",
                    "object": {"data": b64(content), "media_type": f"image/{image_format.lower()}"},
                }[form],
            )
        check_array(PHOTO, row)
        np.testing.assert_array_equal(row, expected)

    @pytest.mark.parametrize(
        "prefix",
        [
            "data:image/jpeg;base64,",  # a supported type that differs from the content
            "data:image/jpg;base64,",
            "data:;base64,",
            "DATA:IMAGE/PNG;BASE64,",
            "data:image/png;charset=utf-8;base64,",
            "data:application/octet-stream;base64,",
        ],
    )
    def test_parse_supported_or_missing_media_type_does_not_change_the_row(self, prefix: str) -> None:
        content = b64(file(scene(32, 32)))
        np.testing.assert_array_equal(parse(PHOTO, prefix + content), parse(PHOTO, content))

    @pytest.mark.parametrize("media_type", ["application/pdf", "image/tiff", "image/gif", "text/html", "x" * 10_000])
    def test_parse_unsupported_declared_media_type_raises(self, media_type: str) -> None:
        content = b64(file(scene(32, 32)))
        assert codec_error(PHOTO, f"data:{media_type};base64,{content}").code == "unsupported_media_type"
        error = codec_error(PHOTO, {"data": content, "media_type": media_type})
        assert (error.code, error.pointer) == ("unsupported_media_type", "/media_type")
        assert len(error.detail) < 200

    @pytest.mark.parametrize(
        "content",
        [
            file(scene(32, 32), "GIF"),
            file(scene(32, 32), "GIF", save_all=True, append_images=[scene(32, 32).rotate(90)]),
            file(scene(32, 32), "BMP"),
            file(scene(32, 32), "TIFF"),
            file(scene(32, 32), "PDF"),
            b"SIMPLE  =                    T",
            b"%!PS-Adobe-3.0 EPSF-3.0",
            b"8BPS\x00\x01",
            b"\x00\x00\x00\x1cftypavif",
            b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        ],
        ids=["gif", "animated-gif", "bmp", "tiff", "pdf", "fits", "eps", "psd", "avif", "svg"],
    )
    def test_parse_unsupported_file_format_raises(self, content: bytes) -> None:
        assert codec_error(PHOTO, content).code == "unsupported_media_type"
        assert codec_error(PHOTO, b64(content)).code == "unsupported_media_type"

    def test_parse_loads_no_plugins_of_other_formats(self) -> None:
        """Most vulnerabilities of Pillow are in rare formats. In a new process, because this one has loaded them all."""
        script = (
            "import io, sys; from PIL import Image; from concord.model import modality\n"
            "from concord.model.codec import parse_bytes, render\n"
            "photo = modality.ImageModality(name='photo', channels=3, height=32, width=32)\n"
            "for image_format in ('PNG', 'JPEG', 'WEBP'):\n"
            "    file = io.BytesIO(); Image.new('RGB', (40, 40)).save(file, image_format)\n"
            "    array = parse_bytes(photo, file.getvalue())\n"
            "    render(photo, array, image_format='webp')\n"
            "print(*(name for name in sys.modules if name.endswith('ImagePlugin')))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60, text=True)
        loaded = {name.removeprefix("PIL.").removesuffix("ImagePlugin") for name in done.stdout.split()}
        assert {"Png", "Jpeg", "WebP"} <= loaded <= {"Png", "Jpeg", "WebP", "Bmp", "Gif", "Ppm", "Tiff"}

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x00",
            b"not an image at all",
            b"<!doctype html><script>alert(1)</script>" + file(scene(8, 8), "JPEG"),
            SIGNATURE,
            png_header(32, 32),
            png_header(0, 0),
            half(file(scene(32, 32))),
            half(file(scene(32, 32), "JPEG")),
            half(file(scene(32, 32), "WEBP")),
            file(scene(32, 32)).replace(b"IDAT", b"IDOT"),
            png_header(32, 32) + chunk(b"IDAT", zlib.compress(b"\x07" * 100)) + chunk(b"IEND", b""),
            png_header(32, 32) + chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"A" * 50_000_000)) + file(scene(32, 32))[33:],
        ],
        ids=[
            "empty",
            "one-byte",
            "garbage",
            "html-first",
            "png-signature",
            "png-header",
            "png-of-size-zero",
            "cut-png",
            "cut-jpeg",
            "cut-webp",
            "png-checksum",
            "png-filter",
            "zlib-bomb-in-itxt",
        ],
    )
    def test_parse_damaged_image_raises_bad_image(self, content: bytes) -> None:
        assert codec_error(PHOTO, content).code == "bad_image"
        assert "0x" not in codec_error(PHOTO, content).detail.replace("\\x", "")  # no object addresses from Pillow's messages

    def test_parse_too_many_pixels_raises_without_decoding(self) -> None:
        """A valid PNG of 30000 x 30000 pixels has 900 kB and needs 2.7 GB of memory. At 13000 x 13000 Pillow only warns."""
        for side in (13_000, 30_000):
            rows = zlib.compressobj(9)
            pixels = b"".join(rows.compress(bytes(1 + 3 * side)) for _ in range(side // 100)) + rows.flush()
            bomb = png_header(side, side) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
            peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            error = codec_error(PHOTO, bomb)
            assert time.perf_counter() - start < 0.5
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000  # kB
            assert error.code == "too_large"

    def test_parse_pixel_limit_is_inclusive(self) -> None:
        content = file(scene(40, 30))
        parse_bytes(PHOTO, content, Limits(image_pixels=1200))
        error = codec_error(PHOTO, content, Limits(image_pixels=1199))
        assert (error.code, "40 x 30" in error.detail) == ("too_large", True)

    def test_parse_byte_limit_is_inclusive(self) -> None:
        content = file(scene(32, 32))
        for size, accepted in ((len(content), True), (len(content) - 1, False)):
            limits = Limits(image_bytes=size)
            for value in (content, b64(content), b64(content).rstrip("="), {"data": b64(content)}):
                if accepted:
                    parse_bytes(PHOTO, value, limits) if isinstance(value, bytes) else parse(PHOTO, value, limits)
                else:
                    assert codec_error(PHOTO, value, limits).code == "too_large"

    def test_parse_too_long_base64_raises_without_decoding(self) -> None:
        """20 MB of characters that are not base64: the error is about the size."""
        assert codec_error(PHOTO, "!" * 20_000_000).code == "too_large"

    def test_parse_jpeg_with_trailing_html_ignores_it(self) -> None:
        content = file(scene(32, 32), "JPEG")
        np.testing.assert_array_equal(parse_bytes(PHOTO, content + b"<html><script>"), parse_bytes(PHOTO, content))

    def test_parse_jpeg_with_too_many_scans_raises(self) -> None:
        content = file(scene(64, 64), "JPEG", progressive=True)
        scan = content[content.rindex(b"\xff\xda") : -2]
        parse_bytes(PHOTO, content)
        assert codec_error(PHOTO, content[:-2] + scan * 200 + content[-2:]).code == "bad_image"

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}], ids=str)
    def test_parse_jpeg_motion_photo_ignores_the_video_behind_it(self, options: dict[str, Any]) -> None:
        content = file(scene(64, 64), "JPEG", **options)
        video = np.random.default_rng(0).integers(0, 256, 8_000_000, dtype=np.uint8).tobytes()
        assert video.count(b"\xff\xda") > 100
        np.testing.assert_array_equal(parse_bytes(PHOTO, content + video), parse_bytes(PHOTO, content))

    def test_parse_jpeg_scans_within_metadata_are_not_counted(self) -> None:
        """A thumbnail is a JPEG inside a segment."""
        content = file(scene(64, 64), "JPEG")
        metadata = b"\xff\xe1" + struct.pack(">H", 2 + 6 + 2 * 300) + b"Exif\0\0" + b"\xff\xda" * 300
        np.testing.assert_array_equal(parse_bytes(PHOTO, content[:2] + metadata + content[2:]), parse_bytes(PHOTO, content))

    @pytest.mark.parametrize(
        "between", [b"", b"\0\1", b"\xff\xd9"[:1], b"\xff\x00", b"\xff\xd0", b"\xff\xfe\0\4\xff\xd9"], ids=repr
    )
    def test_parse_jpeg_scans_behind_bytes_that_libjpeg_skips_are_counted(self, between: bytes) -> None:
        content = file(scene(64, 64), "JPEG", progressive=True)
        scan = content[content.rindex(b"\xff\xda") : -2]
        assert "scans" in codec_error(PHOTO, content[:-2] + (between + scan) * 200 + content[-2:]).detail

    def test_parse_jpeg_with_too_many_segments_raises(self) -> None:
        content = file(scene(64, 64), "JPEG")
        assert "segments" in codec_error(PHOTO, content[:2] + b"\xff\xfe\0\2" * 100_000 + content[2:]).detail

    def test_parse_interlaced_and_progressive_images_match_plain_ones(self) -> None:
        picture = scene(32, 32)
        np.testing.assert_allclose(
            parse_bytes(PHOTO, file(picture, "JPEG", progressive=True, quality=95)),
            parse_bytes(PHOTO, file(picture)),
            atol=0.05,
        )
        interlaced = interlace(np.asarray(picture.convert("L").resize((28, 28))))
        np.testing.assert_array_equal(
            parse_bytes(DIGIT, interlaced), parse_bytes(DIGIT, file(picture.convert("L").resize((28, 28))))
        )

    @pytest.mark.parametrize("size", [(1, 1), (1, 65_535), (65_535, 1), (31, 32), (33, 77), (500, 3)])
    def test_parse_image_of_any_size_has_the_modality_shape(self, size: tuple[int, int]) -> None:
        for modality in (DIGIT, PHOTO, ImageModality(name="wide", channels=3, height=7, width=19)):
            row = parse_bytes(modality, file(Image.new("RGB", size, (255, 128, 0))))
            check_array(modality, row)
            if modality.channels == 3:
                np.testing.assert_allclose(row.mean(axis=(1, 2)), [1, 128 / 255, 0], atol=1e-6)

    def test_parse_other_aspect_ratio_crops_the_centre(self) -> None:
        """A black square between two white thirds: the row contains the square only."""
        wide = Image.new("L", (90, 30), 255)
        wide.paste(0, (30, 0, 60, 30))
        assert parse_bytes(DIGIT, file(wide)).max() < 0.2  # the bicubic filter reaches a little beyond the crop
        assert parse_bytes(DIGIT, file(wide))[:, :, 3:-3].max() == 0
        tall = wide.transpose(Image.Transpose.ROTATE_90)
        assert parse_bytes(DIGIT, file(tall))[:, 3:-3].max() == 0

    def test_parse_larger_image_is_antialiased(self) -> None:
        """A fine chessboard becomes uniform grey, without a moiré pattern."""
        y, x = np.mgrid[0:280, 0:280]
        row = parse_bytes(DIGIT, file(Image.fromarray((255 * ((x + y) % 2)).astype(np.uint8))))
        np.testing.assert_allclose(row, 0.5, atol=0.02)

    def test_parse_16_bit_grey_is_scaled_not_clipped(self) -> None:
        ramp = np.linspace(0, 65_535, 784).astype(np.uint16).reshape(28, 28)
        row = parse_bytes(DIGIT, file(Image.fromarray(ramp)))
        np.testing.assert_allclose(row[0], ramp / 65_535, atol=0.5 / 255 + 1e-6)

    def test_parse_cmyk_becomes_rgb(self) -> None:
        content = file(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95)
        np.testing.assert_allclose(parse_bytes(PHOTO, content).mean(axis=(1, 2)), [1, 0, 0], atol=0.05)

    @pytest.mark.parametrize("background", ["white", "black"])
    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
    def test_parse_transparent_pixels_become_background(self, mode: str, background: Any) -> None:
        modality = PHOTO.model_copy(update={"background": background})
        if mode == "P":
            image = Image.new("P", (32, 32), 1)
            image.putpalette([255, 0, 0, 0, 255, 0])
            content = file(image, transparency=1)
        elif mode == "L":
            content = file(Image.new("L", (32, 32), 77), transparency=77)
        else:
            content = file(Image.new("RGBA", (32, 32), (10, 200, 30, 0)).convert(mode))
        np.testing.assert_array_equal(parse_bytes(modality, content), np.float32(background == "white"))

    @pytest.mark.parametrize("background", ["white", "black"])
    @pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
    def test_parse_grey_png_of_any_depth_has_background_at_its_transparent_level(self, depth: int, background: Any) -> None:
        modality = DIGIT.model_copy(update={"background": background})
        highest = 2**depth - 1
        levels = np.linspace(0, highest, 784).round().astype(int).reshape(28, 28)
        level = int(levels[14, 14])
        expected = np.where(levels == level, float(background == "white"), levels / highest)
        row = parse_bytes(modality, grey_png(levels, depth, transparent=level))
        np.testing.assert_allclose(row[0], expected, atol=0.5 / 255 + 1e-6)

    def test_parse_16_bit_rgb_png_has_background_at_its_transparent_colour(self) -> None:
        levels = np.full((32, 32, 3), (1000, 30_000, 60_000), dtype=">u2")
        levels[:16] = (1000, 30_000, 50_000)
        chunks = chunk(b"tRNS", struct.pack(">HHH", 1000, 30_000, 60_000)), chunk(b"IDAT", packed_rows(levels.tobytes(), 32))
        row = parse_bytes(PHOTO, png_header(32, 32, 16) + b"".join(chunks) + chunk(b"IEND", b""))
        np.testing.assert_array_equal(row[:, 16:], 1)
        np.testing.assert_allclose(row[:, :16], np.broadcast_to([[[0.01]], [[0.46]], [[0.76]]], (3, 16, 32)), atol=0.01)

    @pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4)], ids=["RGB", "RGBA"])
    def test_parse_16_bit_colour_png_matches_8_bits(self, colour: int, channels: int) -> None:
        levels = np.random.default_rng(0).integers(0, 256, (32, 32, channels))
        levels[..., 3:] = 255
        content = png_header(32, 32, 16, colour) + chunk(b"IDAT", packed_rows((levels * 257).astype(">u2").tobytes(), 32))
        np.testing.assert_array_equal(
            parse_bytes(PHOTO, content + chunk(b"IEND", b"")),
            parse_bytes(PHOTO, file(Image.fromarray(levels.astype(np.uint8)))),
        )

    def test_parse_palette_and_1_bit_images_match_plain_ones(self) -> None:
        few = scene(32, 32).quantize(7)
        np.testing.assert_array_equal(parse_bytes(PHOTO, file(few)), parse_bytes(PHOTO, file(few.convert("RGB"))))
        few.info["transparency"] = bytes([0, *[255] * 6])
        np.testing.assert_array_equal(
            parse_bytes(PHOTO, file(few, transparency=few.info["transparency"])),
            parse_bytes(PHOTO, file(few.convert("RGBA"))),
        )
        bits = scene(28, 28).convert("1")
        np.testing.assert_array_equal(parse_bytes(DIGIT, file(bits))[0], np.asarray(bits, np.float32))

    @pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 90}, {"lossless": True, "exact": True}], ids=str)
    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_parse_webp_of_every_kind_is_read(self, mode: str, options: dict[str, Any]) -> None:
        picture = scene(32, 32)
        if mode == "RGBA":
            picture.putalpha(128)
        row, expected = parse_bytes(PHOTO, file(picture, "WEBP", **options)), parse_bytes(PHOTO, file(picture))
        np.testing.assert_allclose(row, expected, atol=0 if "lossless" in options else 0.1)

    @pytest.mark.parametrize("orientation", [1, 3, 6, 8])
    def test_parse_multi_picture_jpeg_uses_the_first_picture_upright(self, orientation: int) -> None:
        """Phones store a preview or a depth map behind the photo (MPO)."""
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright = scene(64, 64)
        stored = upright.transpose(STORED[orientation]) if orientation > 1 else upright
        second = Image.new("RGB", (64, 64), "blue")
        content = file(stored, "MPO", save_all=True, append_images=[second], exif=exif, quality=100)
        assert content.count(b"\xff\xd8\xff") == 2
        np.testing.assert_allclose(parse_bytes(PHOTO, content), array_from_image(PHOTO, upright), atol=0.04)

    def test_parse_half_transparent_pixels_are_blended(self) -> None:
        row = parse_bytes(PHOTO, file(Image.new("RGBA", (32, 32), (0, 0, 0, 51))))
        np.testing.assert_allclose(row, 0.8, atol=0.005)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
    def test_parse_exif_orientation_is_applied(self, orientation: int, image_format: str) -> None:
        options = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}[image_format]
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright = scene(32, 32)
        stored = upright.transpose(STORED[orientation]) if orientation > 1 else upright
        row = parse_bytes(PHOTO, file(stored, image_format, exif=exif, **options))
        np.testing.assert_allclose(row, array_from_image(PHOTO, upright), atol=0.03)

    @pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
    def test_parse_animation_uses_the_first_frame(self, image_format: str) -> None:
        frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
        options = {"lossless": True} if image_format == "WEBP" else {}
        content = file(frames[0], image_format, save_all=True, append_images=frames[1:], duration=40, **options)
        np.testing.assert_array_equal(parse_bytes(PHOTO, content).mean(axis=(1, 2)), [1, 0, 0])

    def test_parse_large_jpeg_decoded_at_reduced_scale_is_close(self) -> None:
        picture = scene(2000, 1500)
        np.testing.assert_allclose(
            parse_bytes(PHOTO, file(picture, "JPEG", quality=95)), parse_bytes(PHOTO, file(picture)), atol=0.02
        )

    def test_array_from_image_matches_file_and_keeps_the_image(self) -> None:
        picture = scene(100, 60)
        before = picture.tobytes()
        np.testing.assert_array_equal(array_from_image(PHOTO, picture), parse_bytes(PHOTO, file(picture)))
        assert (picture.size, picture.tobytes()) == ((100, 60), before)

    def test_array_from_image_damaged_file_raises_bad_image(self) -> None:
        with Image.open(BytesIO(half(file(scene(64, 64))))) as image, pytest.raises(CodecError) as caught:
            array_from_image(PHOTO, image)
        assert caught.value.code == "bad_image"

    @pytest.mark.parametrize(
        ("value", "code", "pointer"),
        [
            (None, "wrong_type", ""),
            (7, "wrong_type", ""),
            ([], "wrong_type", ""),
            ({}, "wrong_type", ""),
            ({"data": 7}, "wrong_type", "/data"),
            ({"data": "", "media_type": 7}, "wrong_type", "/media_type"),
            ({"data": "", "media_type": 0}, "wrong_type", "/media_type"),
            ({"data": "", "media_type": None}, "bad_image", "/data"),
            ({"data": "", "mime": "image/png"}, "wrong_type", ""),
            ({"data": "!"}, "bad_base64", "/data"),
            ({"data": "AAAA"}, "bad_image", "/data"),
            ("https://example.com/7.png", "bad_base64", ""),
            ("data:image/png,abc", "bad_base64", ""),
            ("data:image/png;base64", "bad_base64", ""),
            ("", "bad_image", ""),
        ],
    )
    def test_parse_invalid_image_value_raises_at_its_pointer(self, value: object, code: str, pointer: str) -> None:
        error = codec_error(PHOTO, value)
        assert (error.code, error.pointer) == (code, pointer)


class TestBase64:
    content = file(Image.effect_noise((28, 28), 90))

    def test_parse_base64_both_alphabets_no_padding_white_space_are_accepted(self) -> None:
        plain = b64(self.content)
        assert "+" in plain
        assert "/" in plain
        expected = parse(DIGIT, plain)
        for text in (
            base64.urlsafe_b64encode(self.content).decode(),
            plain.rstrip("="),
            base64.encodebytes(self.content).decode(),
            f" \t{plain}\r\n",
        ):
            np.testing.assert_array_equal(parse(DIGIT, text), expected)

    @pytest.mark.parametrize("safe", ["", "+/", "="])
    @pytest.mark.parametrize("space", ["", " ", "\r\n\t"])
    def test_parse_data_url_percent_encoded_or_behind_white_space_is_accepted(self, safe: str, space: str) -> None:
        plain = b64(self.content)
        url = f"{space}data:image/png;base64,{space}{urllib.parse.quote(plain, safe=safe)}{space}"
        np.testing.assert_array_equal(parse(DIGIT, url), parse(DIGIT, plain))
        np.testing.assert_array_equal(parse(DIGIT, url.replace("image/png", "image%2Fpng")), parse(DIGIT, plain))

    @pytest.mark.parametrize("data", ["%", "%zz", "%C3%A9", "%00", "QUJD%"])
    def test_parse_data_url_invalid_percent_encoding_raises(self, data: str) -> None:
        assert codec_error(DIGIT, f"data:image/png;base64,{data}").code == "bad_base64"

    @pytest.mark.parametrize("damage", ["%2B", "*", "é", "\ud800", "\x00", "\u00a0", "====", "=", "=A"])
    def test_parse_base64_other_characters_raise(self, damage: str) -> None:
        plain = b64(self.content).rstrip("=")
        plain = plain[: len(plain) // 4 * 4]
        assert codec_error(DIGIT, plain[:40] + damage + plain[40:]).code == "bad_base64"

    @pytest.mark.parametrize("text", ["A", "AAAAA", "AA===", "===="])
    def test_parse_base64_of_impossible_length_raises(self, text: str) -> None:
        assert codec_error(DIGIT, text).code == "bad_base64"


class TestText:
    @pytest.mark.parametrize(
        ("text", "tokens"),
        [
            ("seven", [19, 5, 22, 5, 14, 0, 0, 0]),
            ("  SeVen\n", [19, 5, 22, 5, 14, 0, 0, 0]),
            ("a b", [1, 0, 2, 0, 0, 0, 0, 0]),
            ("\uff53\uff45\uff56\uff45\uff4e", [19, 5, 22, 5, 14, 0, 0, 0]),
            ("\ufb01ve", [6, 9, 22, 5, 0, 0, 0, 0]),
            ("abcdefgh", [1, 2, 3, 4, 5, 6, 7, 8]),
        ],
    )
    def test_parse_text_gives_tokens(self, text: str, tokens: list[int]) -> None:
        for row in (parse(WORD, text), parse_bytes(WORD, text.encode()), parse_bytes(WORD, b"\xef\xbb\xbf" + text.encode())):
            check_array(WORD, row)
            assert row.tolist() == tokens

    @pytest.mark.parametrize(
        ("text", "detail"),
        [
            ("", "empty"),
            (" \t\n\u2003", "empty"),
            ("abcdefghi", "9 characters, at most 8"),
            ("se7en!", "'!', '7'"),
            ("sev\x00en", r"\\x00"),
            ("\ud800", "ud800"),
            ("\u202eseven", "u202e"),
            ("se\u0301ven", "é"),
        ],
    )
    def test_parse_text_without_tokens_raises(self, text: str, detail: str) -> None:
        error = codec_error(WORD, text)
        assert error.code == "bad_text"
        assert detail.replace("\\\\", "\\") in error.detail

    def test_parse_text_nul_raises_even_if_it_is_padding(self) -> None:
        modality = TextModality(name="word", length=4, alphabet="\0ab")
        assert parse(modality, "ab").tolist() == [1, 2, 0, 0]
        assert codec_error(modality, "a\0b").code == "bad_text"

    def test_parse_text_lowercase_false_keeps_case(self) -> None:
        modality = TextModality(name="word", length=2, alphabet=" aA", lowercase=False)
        assert parse(modality, "aA").tolist() == [1, 2]

    def test_parse_invalid_text_value_raises(self) -> None:
        assert codec_error(WORD, 7).code == "wrong_type"
        assert codec_error(WORD, None).code == "wrong_type"
        assert codec_error(WORD, b"\xff").code == "bad_text"
        assert codec_error(WORD, " " * 10_001).code == "too_large"
        assert codec_error(WORD, "b" * 10_000).code == "bad_text"

    def test_render_text_uses_the_most_likely_characters(self) -> None:
        for text in ("seven", "a b"):
            one_hot = np.log(np.eye(27, dtype=np.float32)[parse(WORD, text)] * 0.9 + 0.001)
            assert render(WORD, one_hot) == {"text": text}
        padded_left = np.eye(27, dtype=np.float32)[[0, 0, 15, 14, 5, 0, 0, 0]]
        assert render(WORD, padded_left) == {"text": "one"}


class TestClasses:
    def test_parse_class_name_gives_its_index(self) -> None:
        assert parse(BRAND, "Zenith").tolist() == parse_bytes(BRAND, b"Zenith").tolist() == [1]
        check_array(BRAND, parse(BRAND, "acme"))

    def test_render_class_has_most_likely_and_all_probabilities(self) -> None:
        value = render(BRAND, np.array([0.25, 0.75], dtype=np.float32))
        assert value == {"class": "Zenith", "data": {"acme": 0.25, "Zenith": 0.75}}

    @pytest.mark.parametrize(
        "value", ["ZENITH", " zenith", "Zenith\n", b"zenith\r\n", b"\xef\xbb\xbfZenith", "\uff3aenith", "ZENITH\u3000"]
    )
    def test_parse_class_spelled_otherwise_gives_its_index(self, value: str | bytes) -> None:
        assert (parse_bytes(BRAND, value) if isinstance(value, bytes) else parse(BRAND, value)).tolist() == [1]

    def test_parse_class_inner_white_space_and_case_matter_only_where_ambiguous(self) -> None:
        shoes = CategoricalModality(name="kind", classes=("Casual Shoes", "Flip Flops", "flip flops", "Straße", "A\tB"))
        assert parse(shoes, "Casual  shoes").tolist() == [0]
        assert parse(shoes, "strasse").tolist() == [3]
        assert parse(shoes, "a b").tolist() == [4]
        assert [parse(shoes, name).tolist() for name in ("Flip Flops", "flip flops")] == [[1], [2]]
        assert "spell it as one of the classes 'Flip Flops', 'flip flops'" in codec_error(shoes, "FLIP FLOPS").detail

    @pytest.mark.parametrize(
        ("value", "index"), [(2011, 0), (2012.0, 1), (0.5, 2), (-1, 3), (-1.0, 3), ("2012", 1), (b"2012", 1)]
    )
    def test_parse_class_number_gives_the_class_of_this_name(self, value: Any, index: int) -> None:
        assert (parse_bytes(YEAR, value) if isinstance(value, bytes) else parse(YEAR, value)).tolist() == [index]

    def test_parse_class_boolean_gives_the_class_of_this_name(self) -> None:
        modality = CategoricalModality(name="sold", classes=("false", "true"))
        assert [parse(modality, value).tolist() for value in (False, True, "True")] == [[0], [1], [1]]

    @pytest.mark.parametrize(
        ("modality", "value", "code"),
        [
            (BRAND, "zen", "bad_class"),
            (BRAND, "", "bad_class"),
            (BRAND, "acme\0", "bad_class"),
            (BRAND, "acme\ud800", "bad_class"),
            (BRAND, b"\xff", "bad_class"),
            (BRAND, 1, "wrong_type"),
            (BRAND, True, "wrong_type"),
            (BRAND, None, "wrong_type"),
            (BRAND, ["acme"], "wrong_type"),
            (YEAR, 2013, "bad_class"),
            (YEAR, 1, "bad_class"),
            (YEAR, 2011.5, "bad_class"),
            (YEAR, float("nan"), "bad_class"),
            (YEAR, float("inf"), "bad_class"),
        ],
        ids=repr,
    )
    def test_parse_unknown_class_raises(self, modality: Modality, value: object, code: str) -> None:
        assert codec_error(modality, value).code == code

    def test_parse_unknown_class_error_names_few_classes_all(self) -> None:
        assert codec_error(BRAND, "x").detail == "received 'x', the classes are 'acme', 'Zenith'"

    def test_parse_unknown_class_error_names_the_nearest_of_many_classes(self) -> None:
        colours, kinds = ("Red", "Blue", "Casual", "Sports", "Formal"), ("Shoes", "Shirts", "Socks", "Belts", "Bags", "Jeans")
        names = [f"{colour} {kind}" for colour in colours for kind in kinds]
        detail = codec_error(CategoricalModality(name="kind", classes=tuple(names)), "casual shoe").detail
        assert detail.startswith("received 'casual shoe', the nearest of the 30 classes are 'Casual Shoes', ")
        assert "Blue" not in detail

    def test_parse_unknown_class_error_names_some_of_many_classes_if_none_is_near(self) -> None:
        many = CategoricalModality(name="brand", classes=tuple(f"brand {number}" for number in range(10_000)))
        detail = codec_error(many, "?" * 1_000_000).detail
        assert "none of the 10,000 classes is similar: they are 'brand 0', 'brand 1'" in detail
        assert detail.endswith("'brand 19' and 9,980 more")
        assert "'brand 9999'" not in detail
        assert "'brand 999'" in codec_error(many, "brnd 999").detail or "'brand 99'" in codec_error(many, "brnd 999").detail


class TestRawImages:
    ARRAY = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3)

    def test_render_unusual_channels_gives_raw_array(self) -> None:
        value = render(SCAN, self.ARRAY)
        assert value["shape"] == [2, 2, 3]
        np.testing.assert_array_equal(parse(SCAN, value), self.ARRAY)
        np.testing.assert_array_equal(parse_bytes(SCAN, json.dumps(value).encode()), self.ARRAY)

    @pytest.mark.parametrize(
        ("change", "code", "pointer"),
        [
            ({"shape": [2, 3, 2]}, "bad_image", "/shape"),
            ({"dtype": "float64"}, "bad_image", "/dtype"),
            ({"data": "AAAA"}, "bad_image", "/data"),
            ({"data": 7}, "wrong_type", "/data"),
            ({"data": b64(np.full((2, 2, 3), np.nan, "<f4").tobytes())}, "bad_image", "/data"),
            ({"more": 1}, "wrong_type", ""),
        ],
    )
    def test_parse_invalid_raw_image_raises_at_its_pointer(self, change: dict[str, Any], code: str, pointer: str) -> None:
        error = codec_error(SCAN, {**render(SCAN, self.ARRAY), **change})
        assert (error.code, error.pointer) == (code, pointer)

    def test_parse_image_file_for_unusual_channels_raises(self) -> None:
        assert "2 channels" in codec_error(SCAN, b64(file(scene(3, 2)))).detail


class TestVectors:
    def test_parse_vector_standardises_and_render_restores(self) -> None:
        values = [1.5, 3.0, -2.0]
        row = parse(SENSOR, values)
        check_array(SENSOR, row)
        assert row.tolist() == [1.5, 1.0, -1.0]
        assert render(SENSOR, row) == {"data": values}
        value = render(SENSOR, row, vector_format="base64")
        assert value["dtype"] == "float32"
        np.testing.assert_array_equal(parse(SENSOR, value), row)
        np.testing.assert_array_equal(parse_bytes(SENSOR, b"[1.5, 3, -2e0]"), row)

    @pytest.mark.parametrize("value", [12, 12.0, [12], b"12", b"12.0\n", b"\xef\xbb\xbf[12]"])
    def test_parse_number_is_a_vector_of_one(self, value: Any) -> None:
        row = parse_bytes(WEIGHT, value) if isinstance(value, bytes) else parse(WEIGHT, value)
        check_array(WEIGHT, row)
        assert row.tolist() == [1.0]

    @pytest.mark.parametrize(
        ("modality", "value", "code", "pointer"),
        [
            (WEIGHT, float("nan"), "bad_vector", ""),
            (WEIGHT, float("-inf"), "bad_vector", ""),
            (WEIGHT, 10**400, "bad_vector", ""),
            (WEIGHT, True, "bad_vector", ""),
            (WEIGHT, "12", "wrong_type", ""),
            (WEIGHT, b"1e400", "bad_vector", ""),
            (WEIGHT, b"NaN", "bad_vector", ""),
            (WEIGHT, b"[1e400]", "bad_vector", ""),
            (SENSOR, 12, "wrong_type", ""),
        ],
        ids=repr,
    )
    def test_parse_invalid_number_raises(self, modality: Modality, value: object, code: str, pointer: str) -> None:
        error = codec_error(modality, value)
        assert (error.code, error.pointer) == (code, pointer)

    @pytest.mark.parametrize("content", [b"[-0.0, -0, 0]", b"[-1e-400, 0, 5e-324]"])
    def test_parse_vector_signed_zeros_and_tiny_numbers_are_zeros(self, content: bytes) -> None:
        assert parse_bytes(VectorModality(name="x", size=3), content).tolist() == [0, 0, 0]

    def test_parse_vector_without_statistics_keeps_values(self) -> None:
        modality = VectorModality(name="x", size=2)
        assert parse(modality, [3, -4]).tolist() == [3, -4]
        assert render(modality, np.array([3, -4], np.float32)) == {"data": [3, -4]}

    @pytest.mark.parametrize(
        ("value", "code", "pointer"),
        [
            ([1, 2], "bad_vector", ""),
            ([1, 2, 3, 4], "bad_vector", ""),
            ([1, True, 3], "bad_vector", "/1"),
            ([1, "2", 3], "bad_vector", "/1"),
            ([1, None, 3], "bad_vector", "/1"),
            ([1, [2], 3], "bad_vector", "/1"),
            ([1, 2, float("nan")], "bad_vector", "/2"),
            ([1, float("inf"), 3], "bad_vector", "/1"),
            ([1e39, 2, 3], "bad_vector", "/0"),
            ([1, 2, -1e30], "bad_vector", "/2"),
            ([10**400, 2, 3], "bad_vector", "/0"),
            ("AAAA", "wrong_type", ""),
            ({"data": "AAAA"}, "wrong_type", ""),
            ({"data": "AAAA", "dtype": "float64"}, "bad_vector", "/dtype"),
            ({"data": "AAAA", "dtype": "float32"}, "bad_vector", "/data"),
            ({"data": [1, 2, 3], "dtype": "float32"}, "wrong_type", "/data"),
            ({"data": "!", "dtype": "float32"}, "bad_base64", "/data"),
            ({"data": b64(struct.pack("<3f", 1, float("nan"), 3)), "dtype": "float32"}, "bad_vector", "/data"),
            (b"{", "bad_vector", ""),
            (b"[" * 100_000, "bad_vector", ""),
            (b"[1, 2, NaN]", "bad_vector", ""),
        ],
        ids=str,
    )
    def test_parse_invalid_vector_raises_at_its_pointer(self, value: object, code: str, pointer: str) -> None:
        error = codec_error(SENSOR, value)
        assert (error.code, error.pointer) == (code, pointer)


class TestAttributes:
    @pytest.mark.parametrize(
        "value",
        [
            [1, 0],
            [True, False],
            [1.0, 0.0],
            [1.0, -0.0],
            {"a/b": False, "red": True},
            {"red": 1, "a/b": 0},
            {"red": 1.0, "a/b": -0.0},
            b"[1, false]",
            b"\xef\xbb\xbf[1.0, 0.0]",
        ],
    )
    def test_parse_attributes_all_forms_give_the_same_row(self, value: object) -> None:
        row = parse_bytes(TRAITS, value) if isinstance(value, bytes) else parse(TRAITS, value)
        check_array(TRAITS, row)
        assert row.tolist() == [1, 0]

    @pytest.mark.parametrize("value", [1, True, 1.0, [True], b"1", b"true"])
    def test_parse_single_value_is_the_only_attribute(self, value: Any) -> None:
        row = parse_bytes(NEW, value) if isinstance(value, bytes) else parse(NEW, value)
        check_array(NEW, row)
        assert row.tolist() == [1]
        assert codec_error(NEW, 2).pointer == ""

    def test_render_attributes_gives_named_probabilities(self) -> None:
        assert render(TRAITS, np.array([0.25, 0.75], np.float32)) == {"data": {"red": 0.25, "a/b": 0.75}}

    @pytest.mark.parametrize(
        ("value", "code", "pointer", "detail"),
        [
            ([1], "bad_attributes", "", "1 entries, 2 are expected"),
            ([1, 2], "bad_attributes", "/1", "received 2"),
            ([0.5, 0], "bad_attributes", "/0", "received 0.5"),
            ([float("nan"), 0], "bad_attributes", "/0", "received nan"),
            (1, "wrong_type", "", "a number"),
            (["1", 0], "bad_attributes", "/0", "received '1'"),
            ({"red": True, "a/b": None}, "bad_attributes", "/a~1b", "received None"),
            ({"red": True}, "bad_attributes", "", "missing ['a/b']"),
            ({"red": True, "a/b": 0, "blue": 1}, "bad_attributes", "", "unknown ['blue']"),
            ("10", "wrong_type", "", "a string"),
            (b"red", "bad_attributes", "", "not JSON"),
        ],
    )
    def test_parse_invalid_attributes_raises_at_its_pointer(self, value: object, code: str, pointer: str, detail: str) -> None:
        error = codec_error(TRAITS, value)
        assert (error.code, error.pointer) == (code, pointer)
        assert detail in error.detail


def check_row_or_codec_error(parser: Any, modality: Modality, value: object) -> None:
    try:
        row = parser(modality, value)
    except CodecError as error:
        if len(error.detail) > 500:
            raise AssertionError("the detail repeats a long value") from error
    else:
        check_array(modality, row)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["data", "dtype", "media_type", "red", "a/b"]) | st.text(), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(value=json_values, modality=st.sampled_from(MODALITIES))
def test_parse_any_json_gives_a_row_or_codec_error(value: object, modality: Modality) -> None:
    check_row_or_codec_error(parse, modality, value)


@given(
    value=st.text() | st.text().map(lambda text: f"data:image/png;base64,{text}") | st.binary().map(b64),
    modality=st.sampled_from([DIGIT, PHOTO, WORD]),
)
def test_parse_any_string_gives_a_row_or_codec_error(value: str, modality: Modality) -> None:
    check_row_or_codec_error(parse, modality, value)


SEEDS = [
    b"",
    SIGNATURE,
    b"\xff\xd8\xff",
    b"RIFF\x24\x00\x00\x00WEBP",
    *(file(scene(20, 20), image_format) for image_format in ("PNG", "JPEG", "WEBP")),
]


@given(
    seed=st.sampled_from(SEEDS),
    start=st.floats(0, 1),
    patch=st.binary(max_size=40),
    length=st.floats(0.5, 1),
    modality=st.sampled_from(MODALITIES),
)
def test_parse_bytes_any_bytes_give_a_row_or_codec_error(
    seed: bytes, start: float, patch: bytes, length: float, modality: Modality
) -> None:
    """Valid files with replaced bytes and truncated ends reach deeper into the decoders than random bytes."""
    offset = int(start * len(seed))
    content = (seed[:offset] + patch + seed[offset + len(patch) :])[: max(len(patch), int(length * len(seed)))]
    check_row_or_codec_error(parse_bytes, modality, content)


def test_codec_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(CodecError("bad_text", "why", "/0")))
    assert (error.code, error.detail, error.pointer, str(error)) == ("bad_text", "why", "/0", "why")


def interlace(levels: np.ndarray) -> bytes:
    """An interlaced (Adam7) PNG of 8-bit grey levels. Pillow reads these, but cannot write them."""
    height, width = levels.shape
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = b"".join(b"\x00" + row.tobytes() for y, x, dy, dx in passes for row in levels[y::dy, x::dx] if row.size)
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1))
    return SIGNATURE + start + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def packed_rows(levels: bytes, height: int) -> bytes:
    """The content of a PNG's IDAT chunk from its levels, without filters."""
    width = len(levels) // height
    return zlib.compress(b"".join(b"\0" + levels[start : start + width] for start in range(0, len(levels), width)))


def grey_png(levels: np.ndarray, depth: int, transparent: int) -> bytes:
    """A grey PNG of 1 to 16 bits with a transparent level. Pillow writes 2 and 4 bits with a palette only."""
    height, width = levels.shape
    bits = (levels[..., None] >> np.arange(depth - 1, -1, -1) & 1).reshape(height, -1).astype(np.uint8)
    lines = np.packbits(bits, axis=1).tobytes()
    chunks = [chunk(b"tRNS", struct.pack(">H", transparent)), chunk(b"IDAT", packed_rows(lines, height)), chunk(b"IEND", b"")]
    return png_header(width, height, depth, colour=0) + b"".join(chunks)
