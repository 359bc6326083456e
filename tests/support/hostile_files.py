"""Image files that are made to do harm, or are merely unusual, with the statuses that the service may respond with."""

import gzip
import struct
import zlib

import numpy as np
from PIL import Image

from tests.support.images import encode_image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = np.random.default_rng(7).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file: length, kind, content, checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def black_png(*chunks: bytes, width: int = 32, height: int = 32, depth: int = 8, interlace: int = 0) -> bytes:
    """Return a black grey-scale PNG, written without Pillow, which would refuse some of these sizes.

    Args:
        chunks: additional chunks, before the pixels.
        depth: bits per pixel.
    """
    packer = zlib.compressobj(9)
    row = bytes(1 + (width * depth + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, interlace))
    return SIGNATURE + header + b"".join(chunks) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def decompression_bombs() -> dict[str, bytes]:
    """Return small files with very many pixels. The status of each is 413."""
    image = Image.fromarray(PIXELS)
    return {
        "PNG of 30000 x 30000": black_png(width=30_000, height=30_000, depth=1),
        "PNG of 13000 x 13000, where Pillow only warns": black_png(width=13_000, height=13_000, depth=1),
        "PNG of one row": black_png(width=2**31 - 1, height=1, depth=1)[:60] + b"x" * 100,
        "WebP of 5000 x 5000": encode_image(Image.new("RGB", (5000, 5000)), "WEBP", quality=0, method=0),
        "JPEG with a header of 65500 x 65500": encode_image(image, "JPEG").replace(b"\x00\x20\x00\x20", b"\xff\xdc\xff\xdc", 1),
    }


def unusual_files() -> dict[str, tuple[bytes, set[int]]]:
    """Return files with the statuses that are right for them."""
    image = Image.fromarray(PIXELS)
    valid_png = encode_image(image)
    frames = [Image.fromarray(np.roll(PIXELS, shift, axis=0)) for shift in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = image.quantize(16)
    palette.info["transparency"] = bytes(range(0, 256, 16))
    jpeg = encode_image(image, "JPEG")
    zeros = _compressed_zeros()
    return {
        "valid PNG": (valid_png, {200}),
        "half a PNG": (valid_png[: len(valid_png) // 2], {400}),
        "a PNG without its end": (valid_png[:-12], {200, 400}),
        "half a JPEG": (jpeg[: len(jpeg) // 2], {400}),
        "half a WebP": (encode_image(image, "WEBP")[:200], {400}),
        "empty": (b"", {400}),
        "1 x 1": (encode_image(image.resize((1, 1))), {200}),
        "1 x 65535": (encode_image(Image.new("L", (1, 65_535))), {200}),
        "65535 x 1": (encode_image(Image.new("L", (65_535, 1))), {200}),
        "CMYK": (encode_image(image.convert("CMYK"), "JPEG"), {200}),
        "16 bit": (encode_image(Image.fromarray((PIXELS[..., 0].astype(np.uint16)) << 8)), {200}),
        "palette and transparency": (encode_image(palette, transparency=bytes(range(0, 256, 16))), {200}),
        "alpha": (encode_image(image.convert("RGBA")), {200}),
        "rotated by EXIF": (encode_image(image, "JPEG", exif=exif), {200}),
        "interlaced": (black_png(interlace=1), {200, 400}),
        "progressive": (encode_image(image, "JPEG", progressive=True), {200}),
        "animated WebP": (encode_image(frames[0], "WEBP", save_all=True, append_images=frames[1:]), {200}),
        "APNG": (encode_image(frames[0], "PNG", save_all=True, append_images=frames[1:]), {200}),
        "animated GIF": (encode_image(frames[0], "GIF", save_all=True, append_images=frames[1:]), {415}),
        "JPEG and HTML": (jpeg + b"<html><script>alert(1)</script></html>", {200}),
        "a profile of 5 MB": (encode_image(image, "JPEG", icc_profile=b"\x00" * 5_000_000), {200, 400}),
        "a text of 256 MB, compressed": (black_png(png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros)), {200, 400}),
        "a profile of 256 MB, compressed": (black_png(png_chunk(b"iCCP", b"x\0\0" + zeros)), {200, 400}),
        "gamma 0": (black_png(png_chunk(b"gAMA", bytes(4))), {200, 400}),
        "a wrong checksum": (valid_png[:40] + bytes([valid_png[40] ^ 1]) + valid_png[41:], {400}),
        "TIFF": (encode_image(image, "TIFF"), {415}),
        "PDF": (encode_image(image, "PDF"), {415}),
        "EPS": (encode_image(image, "EPS"), {415}),
        "BMP": (encode_image(image, "BMP"), {415}),
        "JPEG 2000": (encode_image(image, "JPEG2000"), {415}),
        "MPO, which starts as a JPEG": (encode_image(image, "MPO", save_all=True, append_images=frames[1:]), {200}),
        "PSD": (b"8BPS\0\1" + bytes(100), {415}),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', {415}),
        "SVG that reads files": (
            b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><svg>&b;</svg>',
            {415},
        ),
        "FITS with a gzip bomb": (b"SIMPLE  =                    T" + gzip.compress(bytes(10_000_000)), {415}),
        "HEIC": (b"\0\0\0\x18ftypheic" + bytes(100), {415}),
        "a script": (b"#!/bin/sh\nrm -rf /\n", {400}),
        "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", {400}),
    }


def _compressed_zeros() -> bytes:
    """Return 256 MB of zeros, compressed into 256 kB."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
