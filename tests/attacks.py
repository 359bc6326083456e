"""Files that are sent to do harm, or that are merely odd, and what the service must answer."""

import gzip
import io
import struct
import zlib

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = np.random.default_rng(7).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def file(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*before: bytes, width: int = 32, height: int = 32, depth: int = 8, interlace: int = 0) -> bytes:
    """A grey PNG of the size, black, with these chunks before its pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width * depth + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, interlace))
    return SIGNATURE + head + b"".join(before) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Small files of very many pixels: 413."""
    image = Image.fromarray(PIXELS)
    return {
        "PNG of 30000 x 30000": png(width=30_000, height=30_000, depth=1),
        "PNG of 13000 x 13000, which Pillow only warns of": png(width=13_000, height=13_000, depth=1),
        "PNG of one row": png(width=2**31 - 1, height=1, depth=1)[:60] + b"x" * 100,
        "WebP of 5000 x 5000": file(Image.new("RGB", (5000, 5000)), "WEBP", quality=0, method=0),
        "JPEG of 65500 x 65500, by its header": file(image, "JPEG").replace(b"\x00\x20\x00\x20", b"\xff\xdc\xff\xdc", 1),
    }


def odd() -> dict[str, tuple[bytes, set[int]]]:
    """Files and the statuses that are right for them."""
    image = Image.fromarray(PIXELS)
    whole = file(image)
    frames = [Image.fromarray(np.roll(PIXELS, shift, axis=0)) for shift in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = image.quantize(16)
    palette.info["transparency"] = bytes(range(0, 256, 16))
    jpeg = file(image, "JPEG")
    zeros = _zeros()
    return {
        "a whole PNG": (whole, {200}),
        "half a PNG": (whole[: len(whole) // 2], {400}),
        "a PNG without its end": (whole[:-12], {200, 400}),
        "half a JPEG": (jpeg[: len(jpeg) // 2], {400}),
        "half a WebP": (file(image, "WEBP")[:200], {400}),
        "nothing": (b"", {400}),
        "1 x 1": (file(image.resize((1, 1))), {200}),
        "1 x 65535": (file(Image.new("L", (1, 65_535))), {200}),
        "65535 x 1": (file(Image.new("L", (65_535, 1))), {200}),
        "CMYK": (file(image.convert("CMYK"), "JPEG"), {200}),
        "16 bit": (file(Image.fromarray((PIXELS[..., 0].astype(np.uint16)) << 8)), {200}),
        "palette and transparency": (file(palette, transparency=bytes(range(0, 256, 16))), {200}),
        "alpha": (file(image.convert("RGBA")), {200}),
        "rotated by EXIF": (file(image, "JPEG", exif=exif), {200}),
        "interlaced": (png(interlace=1), {200, 400}),
        "progressive": (file(image, "JPEG", progressive=True), {200}),
        "animated WebP": (file(frames[0], "WEBP", save_all=True, append_images=frames[1:]), {200}),
        "APNG": (file(frames[0], "PNG", save_all=True, append_images=frames[1:]), {200}),
        "animated GIF": (file(frames[0], "GIF", save_all=True, append_images=frames[1:]), {415}),
        "JPEG and HTML": (jpeg + b"<html><script>alert(1)</script></html>", {200}),
        "a profile of 5 MB": (file(image, "JPEG", icc_profile=b"\x00" * 5_000_000), {200, 400}),
        "a text that unpacks to 256 MB": (png(chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros)), {200, 400}),
        "a profile that unpacks to 256 MB": (png(chunk(b"iCCP", b"x\0\0" + zeros)), {200, 400}),
        "gamma 0": (png(chunk(b"gAMA", bytes(4))), {200, 400}),
        "a wrong checksum": (whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], {400}),
        "TIFF": (file(image, "TIFF"), {415}),
        "PDF": (file(image, "PDF"), {415}),
        "EPS": (file(image, "EPS"), {415}),
        "BMP": (file(image, "BMP"), {415}),
        "JPEG 2000": (file(image, "JPEG2000"), {415}),
        "MPO, which is a JPEG at its start": (file(image, "MPO", save_all=True, append_images=frames[1:]), {200}),
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


def _zeros() -> bytes:
    """256 MB of them, packed into 256 kB."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
