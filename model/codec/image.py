"""Image file <-> array, with Pillow. ``model.codec`` documents the rules."""

import re
import warnings
from io import BytesIO
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import (
    Image,
    ImageColor,
    ImageOps,
    JpegImagePlugin,  # noqa: F401 - the accepted formats: if one is not loaded yet, Pillow loads the plugins of all formats
    PngImagePlugin,
    WebPImagePlugin,  # noqa: F401
)

from concord.model.codec.errors import CodecError, Limits
from concord.model.encoder import ImagePreprocessing
from concord.model.modality import ImageModality

Frame = ImageModality | ImagePreprocessing
"""What a picture is prepared for: channels, height, width and background."""

_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"))
_UNSUPPORTED_SIGNATURES = {  # the error names the format that was sent
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"8BPS": "PSD",
    b"SIMPLE  =": "FITS",
    b"\x00\x00\x00\x0cjP": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
}
_MAX_SCANS = 100
"""Largest number of scans of a progressive JPEG; typical files have ten. A scan takes 30 bytes to send and 10 ms to decode at
16 megapixels."""
_MAX_SEGMENTS = 10_000
"""Largest number of segments of a JPEG; typical files have a hundred. A segment takes 4 bytes to send."""
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""Markers of a JPEG that have a length, and that of its end. The data of a scan has other ones: D0 to D7, and FF 00 for a byte
FF."""
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA
_LEVEL_FACTORS = {"L;2": 85, "L;4": 17}
"""For a grey PNG of few bits, by Pillow's name of its pixels: factor from the file's levels to those of Pillow."""

# Pillow only warns about decompression bombs: turn the warning into an error. warnings.catch_warnings is not thread-safe.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def array_from_image(modality: ImageModality, image: Image.Image) -> Float32[np.ndarray, "channels height width"]:
    """Array of one row from an open Pillow image, (channels, height, width) in [0, 1]. The image is not modified.

    Raises:
        CodecError: ``bad_image`` if the pixels cannot be decoded.
    """
    return _in_unit_range(pixels_from_image(modality, image))


def array_from_file(modality: ImageModality, content: bytes, limits: Limits) -> Float32[np.ndarray, "channels height width"]:
    """Array of one row from the bytes of an image file, (channels, height, width) in [0, 1].

    Raises:
        CodecError: as ``pixels_from_file``.
    """
    return _in_unit_range(pixels_from_file(modality, content, limits))


def pixels_from_image(frame: Frame, image: Image.Image) -> UInt8[np.ndarray, "channels height width"]:
    """Pixels of an open Pillow image, (channels, height, width) from 0 to 255. The image is not modified.

    Raises:
        CodecError: ``bad_image`` if the pixels cannot be decoded.
    """
    try:
        return _to_pixels(frame, image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more
        raise CodecError("bad_image", "the image cannot be decoded") from error


def pixels_from_file(frame: Frame, content: bytes, limits: Limits) -> UInt8[np.ndarray, "channels height width"]:
    """Pixels of an image file, (channels, height, width) from 0 to 255.

    Raises:
        CodecError: ``unsupported_media_type`` or ``too_large`` before any pixel is decoded; ``bad_image`` if the file is not
            an image or cannot be decoded.
    """
    if len(content) > limits.image_bytes:
        raise CodecError("too_large", f"the image has {len(content)} bytes, {limits.image_bytes} are allowed")
    plugin = _detect_plugin(content)
    if plugin == "JPEG":
        _check_scans(content)
    try:
        with Image.open(BytesIO(content), formats=(plugin,)) as image:  # reads the header only
            width, height = image.size
            if width * height <= limits.image_pixels:
                side = 4 * max(frame.height, frame.width)  # a JPEG decoded at this size gives almost the same result
                image.draft(None, (side, side))
                return _to_pixels(frame, image, in_place=True)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise CodecError("too_large", f"the image has more than the allowed {limits.image_pixels} pixels") from error
    except Exception as error:  # see pixels_from_image
        raise CodecError("bad_image", f"the {plugin} file is damaged or cut short") from error
    raise CodecError("too_large", f"the image has {width} x {height} pixels, {limits.image_pixels} are allowed in total")


def file_from_array(array: Float32[np.ndarray, "channels height width"], image_format: Literal["png", "webp"]) -> bytes:
    """Bytes of an image file: lossless, 8 bits per channel, no metadata.

    Args:
        array: values in [0, 1]; values outside are clipped.
    """
    levels = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    image = Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else np.ascontiguousarray(levels))
    file = BytesIO()
    image.save(file, image_format, **({"lossless": True} if image_format == "webp" else {}))
    return file.getvalue()


def _detect_plugin(content: bytes) -> str:
    """Name of the Pillow plugin for the file's signature.

    Raises:
        CodecError: ``unsupported_media_type`` for a known format that is not accepted, else ``bad_image``.
    """
    for signature, plugin in _SIGNATURES:
        if content.startswith(signature):
            return plugin
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    unsupported = next((name for signature, name in _UNSUPPORTED_SIGNATURES.items() if content.startswith(signature)), None)
    if content[4:8] == b"ftyp":
        unsupported = "HEIC or AVIF"
    if unsupported:
        raise CodecError("unsupported_media_type", f"the content is {unsupported}: send PNG, JPEG or WebP")
    raise CodecError("bad_image", f"not a PNG, JPEG or WebP image: {len(content)} bytes that begin with {content[:8]!r}")


def _check_scans(content: bytes) -> None:
    """Check the number of scans and segments of a JPEG up to the end of the picture. What follows it, such as the video of a
    motion photo, is not read.

    Markers are found as libjpeg finds them: bytes between two segments are skipped.

    Raises:
        CodecError: ``bad_image``.
    """
    position, scans = 2, 0
    for _ in range(_MAX_SEGMENTS):
        found = _JPEG_MARKER.search(content, position)
        if found is None or content[found.start() + 1] == _JPEG_END:
            return
        scans += content[found.start() + 1] == _JPEG_SCAN
        if scans > _MAX_SCANS:
            raise CodecError("bad_image", f"the JPEG has more than {_MAX_SCANS} scans: save it again as baseline")
        length = int.from_bytes(content[found.end() : found.end() + 2], "big")
        position = found.end() + length
    raise CodecError("bad_image", f"the JPEG has more than {_MAX_SEGMENTS} segments: save it again without metadata")


def _to_pixels(frame: Frame, image: Image.Image, *, in_place: bool = False) -> UInt8[np.ndarray, "channels height width"]:
    key = _transparent_level(image)
    if in_place:
        ImageOps.exif_transpose(image, in_place=True)
    upright = image if in_place else ImageOps.exif_transpose(image)
    if key is not None:
        upright.info["transparency"] = key
    flat, mode = _to_opaque_8_bit(upright, frame.background), "L" if frame.channels == 1 else "RGB"
    if flat.mode != mode:
        flat = flat.convert(mode)
    size = (frame.width, frame.height)
    box, resampling = _centred_box(frame, flat.size), Image.Resampling.BICUBIC
    if isinstance(frame, ImagePreprocessing) and frame.resampling == "bilinear":
        resampling = Image.Resampling.BILINEAR
    if flat.size != size or box != (0.0, 0.0, *flat.size):
        flat = flat.resize(size, resampling, box=box)
    channels_last = np.asarray(flat, dtype=np.uint8).reshape(frame.height, frame.width, frame.channels)
    return np.ascontiguousarray(channels_last.transpose(2, 0, 1))


def _centred_box(frame: Frame, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a picture that is kept: the largest centred box with the frame's aspect ratio, smaller if an encoder cuts off
    its margins, or the whole picture. The edges may lie between pixels.

    Args:
        size: width and height of the picture.
    """
    width, height = size
    if isinstance(frame, ImagePreprocessing) and frame.stretch:
        return (0.0, 0.0, float(width), float(height))
    scale = min(width / frame.width, height / frame.height)
    if isinstance(frame, ImagePreprocessing) and frame.resize is not None:
        scale *= min(frame.height, frame.width) / frame.resize
    left = max(0.0, (width - scale * frame.width) / 2)  # rounding may leave -1e-16
    top = max(0.0, (height - scale * frame.height) / 2)
    return (left, top, width - left, height - top)


def _in_unit_range(pixels: UInt8[np.ndarray, "*axes"]) -> Float32[np.ndarray, "*axes"]:
    array = pixels.astype(np.float32)
    return np.divide(array, np.float32(255), out=array)


def _to_opaque_8_bit(image: Image.Image, background: str) -> Image.Image:
    """The image with 8 bits per channel and without transparency."""
    if image.mode.startswith("I;16"):
        levels = np.asarray(image, dtype=np.float32)
        opaque = np.rint(levels / 257).astype(np.uint8)
        if "transparency" in image.info:
            opaque[levels == image.info["transparency"]] = ImageColor.getrgb(background)[0]  # black or white
        return Image.fromarray(opaque)
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)


def _transparent_level(image: Image.Image) -> int | tuple[int, ...] | None:
    """The level or colour of a PNG that is transparent, in Pillow's levels. The file has it in levels of its bit depth, and
    Pillow does not convert them. None: nothing is to be converted."""
    key = image.info.get("transparency")
    pixels = image.tile[0].args if isinstance(image, PngImagePlugin.PngImageFile) and image.tile else None
    if isinstance(key, int) and pixels in _LEVEL_FACTORS:
        return key * _LEVEL_FACTORS[pixels]
    if isinstance(key, tuple) and pixels == "RGB;16B":  # Pillow keeps the upper bytes of the pixels
        return tuple(level >> 8 for level in key)
    return None
