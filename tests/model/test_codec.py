"""Wire values become rows or are refused with a reason; what was encoded comes back."""

import base64
import json
import pickle
import resource
import struct
import subprocess
import sys
import time
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.codec import CodecError, Limits, array_from_image, decode, decode_bytes, encode
from model.modality import (
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
SCAN = ImageModality(name="scan", channels=2, height=2, width=3)
MODALITIES = [DIGIT, PHOTO, WORD, SENSOR, TRAITS, TITLE, BRAND, SCAN]

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


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def scene(width: int, height: int) -> Image.Image:
    """A smooth picture without symmetry, so that a turn, a crop or a swapped channel shows."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    return Image.fromarray(np.stack([red, green, (red + green) / 4], axis=-1).astype(np.uint8))


def refusal(modality: Modality, value: object, limits: Limits | None = None) -> CodecError:
    read: Any = decode_bytes if isinstance(value, bytes) else decode
    with pytest.raises(CodecError) as caught:
        read(modality, value, limits or Limits())
    assert caught.value.detail == str(caught.value) != ""
    return caught.value


STORED = {  # how a camera that writes this orientation stores what is to be seen
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
    def test_lossless_round_trip_is_exact(self, modality: ImageModality, image_format: Any) -> None:
        levels = np.random.default_rng(0).integers(0, 256, modality.shape)
        row = (levels / 255).astype(np.float32)
        wire = encode(modality, row, image_format=image_format)
        assert (wire["media_type"], wire["width"], wire["height"]) == (f"image/{image_format}", modality.width, modality.height)
        once = decode(modality, wire["data"])
        np.testing.assert_array_equal(np.rint(once * 255), levels)
        np.testing.assert_array_equal(decode(modality, {k: wire[k] for k in ("data", "media_type")}), once)
        assert encode(modality, once, image_format=image_format) == wire

    def test_answers_carry_no_metadata(self) -> None:
        with Image.open(BytesIO(base64.b64decode(encode(PHOTO, np.zeros(PHOTO.shape, np.float32))["data"]))) as image:
            assert image.info == {}

    def test_values_beyond_the_range_are_clipped(self) -> None:
        row = np.full(DIGIT.shape, 1.5, np.float32)
        row[0, 0, 0] = -0.5
        back = decode(DIGIT, encode(DIGIT, row)["data"])
        assert back[0, 0, 0] == 0
        assert back[0, 1, 1] == 1

    def test_raw_is_the_array_itself(self) -> None:
        row = np.random.default_rng(0).random(PHOTO.shape, dtype=np.float32)
        wire = encode(PHOTO, row, image_format="raw")
        assert (wire["shape"], wire["dtype"]) == ([3, 32, 32], "float32")
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(wire["data"]), "<f4").reshape(PHOTO.shape), row)

    @pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
    @pytest.mark.parametrize("wrap", ["bare", "url", "object", "bytes"])
    def test_every_form_of_every_format_gives_the_same_row(self, image_format: str, wrap: str) -> None:
        content = file(scene(32, 32), image_format)
        with Image.open(BytesIO(content)) as image:
            expected = np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / np.float32(255)
        if wrap == "bytes":
            row = decode_bytes(PHOTO, content)
        else:
            row = decode(
                PHOTO,
                {
                    "bare": b64(content),
                    "url": f"data:image/{image_format.lower()};base64,{b64(content)}",
                    "object": {"data": b64(content), "media_type": f"image/{image_format.lower()}"},
                }[wrap],
            )
        check_array(PHOTO, row)
        np.testing.assert_array_equal(row, expected)

    @pytest.mark.parametrize(
        "prefix",
        [
            "data:image/jpeg;base64,",  # a known type that differs: the content wins
            "data:image/jpg;base64,",
            "data:;base64,",
            "DATA:IMAGE/PNG;BASE64,",
            "data:image/png;charset=utf-8;base64,",
            "data:application/octet-stream;base64,",
        ],
    )
    def test_a_known_or_missing_media_type_is_not_believed(self, prefix: str) -> None:
        content = b64(file(scene(32, 32)))
        np.testing.assert_array_equal(decode(PHOTO, prefix + content), decode(PHOTO, content))

    @pytest.mark.parametrize("media_type", ["application/pdf", "image/tiff", "image/gif", "text/html", "x" * 10_000])
    def test_a_declared_type_that_is_not_taken_is_refused(self, media_type: str) -> None:
        content = b64(file(scene(32, 32)))
        assert refusal(PHOTO, f"data:{media_type};base64,{content}").code == "unsupported_media_type"
        error = refusal(PHOTO, {"data": content, "media_type": media_type})
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
    def test_other_formats_are_unsupported(self, content: bytes) -> None:
        assert refusal(PHOTO, content).code == "unsupported_media_type"
        assert refusal(PHOTO, b64(content)).code == "unsupported_media_type"

    def test_decoders_of_other_formats_are_not_even_loaded(self) -> None:
        """They are where Pillow's faults are found. A process of its own: this one has loaded them all."""
        script = (
            "import io, sys; from PIL import Image; from model.codec import decode_bytes, encode; from model import modality\n"
            "photo = modality.ImageModality(name='photo', channels=3, height=32, width=32)\n"
            "for image_format in ('PNG', 'JPEG', 'WEBP'):\n"
            "    file = io.BytesIO(); Image.new('RGB', (40, 40)).save(file, image_format)\n"
            "    array = decode_bytes(photo, file.getvalue())\n"
            "    encode(photo, array, image_format='webp')\n"
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
            header(32, 32),
            header(0, 0),
            half(file(scene(32, 32))),
            half(file(scene(32, 32), "JPEG")),
            half(file(scene(32, 32), "WEBP")),
            file(scene(32, 32)).replace(b"IDAT", b"IDOT"),
            header(32, 32) + chunk(b"IDAT", zlib.compress(b"\x07" * 100)) + chunk(b"IEND", b""),
            header(32, 32) + chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"A" * 50_000_000)) + file(scene(32, 32))[33:],
        ],
        ids=[
            "empty",
            "one-byte",
            "garbage",
            "html-first",
            "png-signature",
            "png-header",
            "png-of-no-size",
            "cut-png",
            "cut-jpeg",
            "cut-webp",
            "png-checksum",
            "png-filter",
            "zlib-bomb-in-itxt",
        ],
    )
    def test_damaged_files_are_bad_images(self, content: bytes) -> None:
        assert refusal(PHOTO, content).code == "bad_image"
        assert "0x" not in refusal(PHOTO, content).detail.replace("\\x", "")  # no object address from Pillow's messages

    def test_pixels_are_counted_before_they_are_decoded(self) -> None:
        """A valid 30000 x 30000 PNG of 900 kB would take 2.7 GB; one of 13000 x 13000 only makes Pillow warn."""
        for side in (13_000, 30_000):
            rows = zlib.compressobj(9)
            pixels = b"".join(rows.compress(bytes(1 + 3 * side)) for _ in range(side // 100)) + rows.flush()
            bomb = header(side, side) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
            peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            error = refusal(PHOTO, bomb)
            assert time.perf_counter() - began < 0.5
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000  # kB
            assert error.code == "too_large"

    def test_the_pixel_limit_is_exact(self) -> None:
        content = file(scene(40, 30))
        decode_bytes(PHOTO, content, Limits(image_pixels=1200))
        error = refusal(PHOTO, content, Limits(image_pixels=1199))
        assert (error.code, "40 x 30" in error.detail) == ("too_large", True)

    def test_the_byte_limit_is_exact(self) -> None:
        content = file(scene(32, 32))
        for size, accepted in ((len(content), True), (len(content) - 1, False)):
            limits = Limits(image_bytes=size)
            for value in (content, b64(content), b64(content).rstrip("="), {"data": b64(content)}):
                if accepted:
                    decode_bytes(PHOTO, value, limits) if isinstance(value, bytes) else decode(PHOTO, value, limits)
                else:
                    assert refusal(PHOTO, value, limits).code == "too_large"

    def test_base64_is_measured_before_it_is_decoded(self) -> None:
        """20 MB of characters that are not even base64 are refused for their length."""
        assert refusal(PHOTO, "!" * 20_000_000).code == "too_large"

    def test_jpeg_with_html_behind_it_is_its_image(self) -> None:
        content = file(scene(32, 32), "JPEG")
        np.testing.assert_array_equal(decode_bytes(PHOTO, content + b"<html><script>"), decode_bytes(PHOTO, content))

    def test_a_jpeg_of_endless_scans_is_refused(self) -> None:
        content = file(scene(64, 64), "JPEG", progressive=True)
        scan = content[content.rindex(b"\xff\xda") : -2]
        decode_bytes(PHOTO, content)
        assert refusal(PHOTO, content[:-2] + scan * 200 + content[-2:]).code == "bad_image"

    def test_interlaced_and_progressive_files_are_read(self) -> None:
        picture = scene(32, 32)
        np.testing.assert_allclose(
            decode_bytes(PHOTO, file(picture, "JPEG", progressive=True, quality=95)),
            decode_bytes(PHOTO, file(picture)),
            atol=0.05,
        )
        interlaced = interlace(np.asarray(picture.convert("L").resize((28, 28))))
        np.testing.assert_array_equal(
            decode_bytes(DIGIT, interlaced), decode_bytes(DIGIT, file(picture.convert("L").resize((28, 28))))
        )

    @pytest.mark.parametrize("size", [(1, 1), (1, 65_535), (65_535, 1), (31, 32), (33, 77), (500, 3)])
    def test_any_size_becomes_the_modality_s(self, size: tuple[int, int]) -> None:
        for modality in (DIGIT, PHOTO, ImageModality(name="wide", channels=3, height=7, width=19)):
            row = decode_bytes(modality, file(Image.new("RGB", size, (255, 128, 0))))
            check_array(modality, row)
            if modality.channels == 3:
                np.testing.assert_allclose(row.mean(axis=(1, 2)), [1, 128 / 255, 0], atol=1e-6)

    def test_the_centre_is_cropped_and_the_aspect_kept(self) -> None:
        """Left and right thirds are white, the middle is a black square: only the square is seen."""
        wide = Image.new("L", (90, 30), 255)
        wide.paste(0, (30, 0, 60, 30))
        assert decode_bytes(DIGIT, file(wide)).max() < 0.2  # the bicubic filter sees a little of the border
        assert decode_bytes(DIGIT, file(wide))[:, :, 3:-3].max() == 0
        tall = wide.transpose(Image.Transpose.ROTATE_90)
        assert decode_bytes(DIGIT, file(tall))[:, 3:-3].max() == 0

    def test_shrinking_is_antialiased(self) -> None:
        """A fine chessboard becomes grey, not a moiré."""
        y, x = np.mgrid[0:280, 0:280]
        row = decode_bytes(DIGIT, file(Image.fromarray((255 * ((x + y) % 2)).astype(np.uint8))))
        np.testing.assert_allclose(row, 0.5, atol=0.02)

    def test_sixteen_bits_are_scaled_not_clipped(self) -> None:
        ramp = np.linspace(0, 65_535, 784).astype(np.uint16).reshape(28, 28)
        row = decode_bytes(DIGIT, file(Image.fromarray(ramp)))
        np.testing.assert_allclose(row[0], ramp / 65_535, atol=0.5 / 255 + 1e-6)

    def test_cmyk_becomes_rgb(self) -> None:
        content = file(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95)
        np.testing.assert_allclose(decode_bytes(PHOTO, content).mean(axis=(1, 2)), [1, 0, 0], atol=0.05)

    @pytest.mark.parametrize("background", ["white", "black"])
    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
    def test_transparent_pixels_show_the_background(self, mode: str, background: Any) -> None:
        modality = PHOTO.model_copy(update={"background": background})
        if mode == "P":
            image = Image.new("P", (32, 32), 1)
            image.putpalette([255, 0, 0, 0, 255, 0])
            content = file(image, transparency=1)
        elif mode == "L":
            content = file(Image.new("L", (32, 32), 77), transparency=77)
        else:
            content = file(Image.new("RGBA", (32, 32), (10, 200, 30, 0)).convert(mode))
        np.testing.assert_array_equal(decode_bytes(modality, content), np.float32(background == "white"))

    def test_half_transparent_pixels_are_blended(self) -> None:
        row = decode_bytes(PHOTO, file(Image.new("RGBA", (32, 32), (0, 0, 0, 51))))
        np.testing.assert_allclose(row, 0.8, atol=0.005)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
    def test_exif_orientation_is_applied(self, orientation: int, image_format: str) -> None:
        options = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}[image_format]
        exif = Image.Exif()
        exif[0x0112] = orientation
        seen = scene(32, 32)
        stored = seen.transpose(STORED[orientation]) if orientation > 1 else seen
        row = decode_bytes(PHOTO, file(stored, image_format, exif=exif, **options))
        np.testing.assert_allclose(row, array_from_image(PHOTO, seen), atol=0.03)

    @pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
    def test_the_first_frame_of_an_animation_counts(self, image_format: str) -> None:
        frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
        options = {"lossless": True} if image_format == "WEBP" else {}
        content = file(frames[0], image_format, save_all=True, append_images=frames[1:], duration=40, **options)
        np.testing.assert_array_equal(decode_bytes(PHOTO, content).mean(axis=(1, 2)), [1, 0, 0])

    def test_large_jpegs_are_read_at_reduced_scale_with_close_answers(self) -> None:
        picture = scene(2000, 1500)
        np.testing.assert_allclose(
            decode_bytes(PHOTO, file(picture, "JPEG", quality=95)), decode_bytes(PHOTO, file(picture)), atol=0.02
        )

    def test_an_open_image_gives_the_row_of_its_file_and_is_left_alone(self) -> None:
        picture = scene(100, 60)
        before = picture.tobytes()
        np.testing.assert_array_equal(array_from_image(PHOTO, picture), decode_bytes(PHOTO, file(picture)))
        assert (picture.size, picture.tobytes()) == ((100, 60), before)

    def test_an_open_image_that_cannot_be_read_is_refused(self) -> None:
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
    def test_other_values_are_refused_where_they_are_wrong(self, value: object, code: str, pointer: str) -> None:
        error = refusal(PHOTO, value)
        assert (error.code, error.pointer) == (code, pointer)


class TestBase64:
    content = file(Image.effect_noise((28, 28), 90))

    def test_both_alphabets_no_padding_and_white_space_are_taken(self) -> None:
        plain = b64(self.content)
        assert "+" in plain
        assert "/" in plain
        expected = decode(DIGIT, plain)
        for text in (
            base64.urlsafe_b64encode(self.content).decode(),
            plain.rstrip("="),
            base64.encodebytes(self.content).decode(),
            f" \t{plain}\r\n",
        ):
            np.testing.assert_array_equal(decode(DIGIT, text), expected)

    @pytest.mark.parametrize("damage", ["*", "é", "\ud800", "\x00", "\u00a0", "====", "=", "=A"])
    def test_anything_else_is_refused(self, damage: str) -> None:
        plain = b64(self.content).rstrip("=")
        plain = plain[: len(plain) // 4 * 4]
        assert refusal(DIGIT, plain[:40] + damage + plain[40:]).code == "bad_base64"

    @pytest.mark.parametrize("text", ["A", "AAAAA", "AA===", "===="])
    def test_lengths_that_no_bytes_have_are_refused(self, text: str) -> None:
        assert refusal(DIGIT, text).code == "bad_base64"


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
    def test_tokens(self, text: str, tokens: list[int]) -> None:
        for row in (decode(WORD, text), decode_bytes(WORD, text.encode())):
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
    def test_what_has_no_tokens_is_refused(self, text: str, detail: str) -> None:
        error = refusal(WORD, text)
        assert error.code == "bad_text"
        assert detail.replace("\\\\", "\\") in error.detail

    def test_nul_is_refused_even_where_it_pads(self) -> None:
        modality = TextModality(name="word", length=4, alphabet="\0ab")
        assert decode(modality, "ab").tolist() == [1, 2, 0, 0]
        assert refusal(modality, "a\0b").code == "bad_text"

    def test_case_is_kept_where_the_modality_says_so(self) -> None:
        modality = TextModality(name="word", length=2, alphabet=" aA", lowercase=False)
        assert decode(modality, "aA").tolist() == [1, 2]

    def test_other_values_are_refused(self) -> None:
        assert refusal(WORD, 7).code == "wrong_type"
        assert refusal(WORD, None).code == "wrong_type"
        assert refusal(WORD, b"\xff").code == "bad_text"
        assert refusal(WORD, " " * 10_001).code == "too_large"
        assert refusal(WORD, "b" * 10_000).code == "bad_text"

    def test_the_likeliest_characters_are_the_text(self) -> None:
        for text in ("seven", "a b"):
            one_hot = np.log(np.eye(27, dtype=np.float32)[decode(WORD, text)] * 0.9 + 0.001)
            assert encode(WORD, one_hot) == {"text": text}
        padded_left = np.eye(27, dtype=np.float32)[[0, 0, 15, 14, 5, 0, 0, 0]]
        assert encode(WORD, padded_left) == {"text": "one"}


class TestClasses:
    def test_the_wire_form_is_the_name(self) -> None:
        assert decode(BRAND, "Zenith").tolist() == decode_bytes(BRAND, b"Zenith").tolist() == [1]
        check_array(BRAND, decode(BRAND, "acme"))

    def test_the_likeliest_class_comes_with_all_probabilities(self) -> None:
        answer = encode(BRAND, np.array([0.25, 0.75], dtype=np.float32))
        assert answer == {"class": "Zenith", "data": {"acme": 0.25, "Zenith": 0.75}}

    @pytest.mark.parametrize(("value", "code"), [("zenith", "bad_class"), (b"\xff", "bad_class"), (1, "wrong_type")])
    def test_another_name_is_refused(self, value: object, code: str) -> None:
        assert refusal(BRAND, value).code == code

    def test_a_refusal_names_the_classes_but_not_thousands(self) -> None:
        many = CategoricalModality(name="brand", classes=tuple(map(str, range(1000))))
        assert refusal(BRAND, "x").detail == "received 'x', the classes are 'acme', 'Zenith'"
        assert refusal(many, "x").detail.endswith("'19' and 980 more")


class TestChannelsThatNoFileHas:
    ARRAY = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3)

    def test_the_array_travels_as_numbers(self) -> None:
        wire = encode(SCAN, self.ARRAY)
        assert wire["shape"] == [2, 2, 3]
        np.testing.assert_array_equal(decode(SCAN, wire), self.ARRAY)
        np.testing.assert_array_equal(decode_bytes(SCAN, json.dumps(wire).encode()), self.ARRAY)

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
    def test_other_numbers_are_refused_where_they_are_wrong(self, change: dict[str, Any], code: str, pointer: str) -> None:
        error = refusal(SCAN, {**encode(SCAN, self.ARRAY), **change})
        assert (error.code, error.pointer) == (code, pointer)

    def test_a_file_is_refused(self) -> None:
        assert "2 channels" in refusal(SCAN, b64(file(scene(3, 2)))).detail


class TestVectors:
    def test_wire_values_are_raw_and_rows_standardised(self) -> None:
        values = [1.5, 3.0, -2.0]
        row = decode(SENSOR, values)
        check_array(SENSOR, row)
        assert row.tolist() == [1.5, 1.0, -1.0]
        assert encode(SENSOR, row) == {"data": values}
        wire = encode(SENSOR, row, vector_format="base64")
        assert wire["dtype"] == "float32"
        np.testing.assert_array_equal(decode(SENSOR, wire), row)
        np.testing.assert_array_equal(decode_bytes(SENSOR, b"[1.5, 3, -2e0]"), row)

    def test_without_statistics_rows_are_as_measured(self) -> None:
        modality = VectorModality(name="x", size=2)
        assert decode(modality, [3, -4]).tolist() == [3, -4]
        assert encode(modality, np.array([3, -4], np.float32)) == {"data": [3, -4]}

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
    def test_what_is_no_vector_is_refused(self, value: object, code: str, pointer: str) -> None:
        error = refusal(SENSOR, value)
        assert (error.code, error.pointer) == (code, pointer)


class TestAttributes:
    @pytest.mark.parametrize("value", [[1, 0], [True, False], {"a/b": False, "red": True}, {"red": 1, "a/b": 0}, b"[1, false]"])
    def test_rows(self, value: object) -> None:
        row = decode_bytes(TRAITS, value) if isinstance(value, bytes) else decode(TRAITS, value)
        check_array(TRAITS, row)
        assert row.tolist() == [1, 0]

    def test_probabilities_are_named(self) -> None:
        assert encode(TRAITS, np.array([0.25, 0.75], np.float32)) == {"data": {"red": 0.25, "a/b": 0.75}}

    @pytest.mark.parametrize(
        ("value", "code", "pointer", "detail"),
        [
            ([1], "bad_attributes", "", "1 entries, 2 are expected"),
            ([1, 2], "bad_attributes", "/1", "received 2"),
            ([1.0, 0], "bad_attributes", "/0", "received 1.0"),
            (["1", 0], "bad_attributes", "/0", "received '1'"),
            ({"red": True, "a/b": None}, "bad_attributes", "/a~1b", "received None"),
            ({"red": True}, "bad_attributes", "", "missing ['a/b']"),
            ({"red": True, "a/b": 0, "blue": 1}, "bad_attributes", "", "unknown ['blue']"),
            ("10", "wrong_type", "", "a string"),
            (b"red", "bad_attributes", "", "not JSON"),
        ],
    )
    def test_what_is_unclear_is_refused(self, value: object, code: str, pointer: str, detail: str) -> None:
        error = refusal(TRAITS, value)
        assert (error.code, error.pointer) == (code, pointer)
        assert detail in error.detail


def row_or_refusal(read: Any, modality: Modality, value: object) -> None:
    try:
        row = read(modality, value)
    except CodecError as error:
        if len(error.detail) > 500:
            raise AssertionError("a detail that repeats what was sent") from error
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
def test_any_json_is_a_row_or_a_codec_error(value: object, modality: Modality) -> None:
    row_or_refusal(decode, modality, value)


@given(
    value=st.text() | st.text().map(lambda text: f"data:image/png;base64,{text}") | st.binary().map(b64),
    modality=st.sampled_from([DIGIT, PHOTO, WORD]),
)
def test_any_string_is_a_row_or_a_codec_error(value: str, modality: Modality) -> None:
    row_or_refusal(decode, modality, value)


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
def test_any_bytes_are_a_row_or_a_codec_error(
    seed: bytes, start: float, patch: bytes, length: float, modality: Modality
) -> None:
    """Valid files with bytes replaced and their ends cut off reach deeper into the decoders than noise does."""
    at = int(start * len(seed))
    content = (seed[:at] + patch + seed[at + len(patch) :])[: max(len(patch), int(length * len(seed)))]
    row_or_refusal(decode_bytes, modality, content)


def test_an_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(CodecError("bad_text", "why", "/0")))
    assert (error.code, error.detail, error.pointer, str(error)) == ("bad_text", "why", "/0", "why")


def interlace(levels: np.ndarray) -> bytes:
    """An Adam7 PNG of 8-bit grey levels, written by hand: Pillow reads but does not write them."""
    height, width = levels.shape
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = b"".join(b"\x00" + row.tobytes() for y, x, dy, dx in passes for row in levels[y::dy, x::dx] if row.size)
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1))
    return SIGNATURE + start + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
