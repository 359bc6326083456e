"""Image file <-> array, with Pillow. The rules are documented in ``model.codec``."""

import warnings
from io import BytesIO
from typing import Literal

import numpy as np
from jaxtyping import Float32
from PIL import (
    Image,
    ImageOps,
    JpegImagePlugin,  # noqa: F401 - the three that are taken: asked for a format it does not know yet, Pillow loads them all
    PngImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from model.modality import ImageModality
from model.wire import CodecError, Limits

_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"))
_FOREIGN = {  # named in the refusal, so that a reader knows what was sent
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
"""Of a progressive JPEG; usual files have ten. Each costs 10 ms at 16 megapixels, and its sender as little as thirty bytes."""

# Pillow's own bomb guard must refuse, not print. Set once: warnings.catch_warnings is not safe in the threads that decode.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def array_from_image(modality: ImageModality, image: Image.Image) -> Float32[np.ndarray, "channels height width"]:
    """The array of one row from an image that is open already; the image itself is left as it was.

    Raises:
        CodecError: ``bad_image``, the pixels cannot be decoded.
    """
    try:
        return _pixels(modality, image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more
        raise CodecError("bad_image", "the image cannot be decoded") from error


def array_from_file(modality: ImageModality, content: bytes, limits: Limits) -> Float32[np.ndarray, "channels height width"]:
    """The array of one row from the bytes of an image file, values in [0, 1].

    Raises:
        CodecError: ``bad_image``, ``unsupported_media_type`` or ``too_large``, seen before any pixel is decoded.
    """
    if len(content) > limits.image_bytes:
        raise CodecError("too_large", f"the image has {len(content)} bytes, {limits.image_bytes} are allowed")
    plugin = _sniff(content)
    if plugin == "JPEG" and content.count(b"\xff\xda") > _MAX_SCANS:
        raise CodecError("bad_image", f"the JPEG has more than {_MAX_SCANS} scans: save it again as baseline")
    try:
        with Image.open(BytesIO(content), formats=(plugin,)) as image:  # reads the header alone
            width, height = image.size
            if width * height <= limits.image_pixels:
                side = 4 * max(modality.height, modality.width)  # far enough above the target to keep the answer close
                image.draft(None, (side, side))
                return _pixels(modality, image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise CodecError("too_large", f"the image has more than the allowed {limits.image_pixels} pixels") from error
    except Exception as error:  # see array_from_image
        raise CodecError("bad_image", f"the {plugin} file is damaged or cut short") from error
    raise CodecError("too_large", f"the image has {width} x {height} pixels, {limits.image_pixels} are allowed in all")


def file_from_array(array: Float32[np.ndarray, "channels height width"], image_format: Literal["png", "webp"]) -> bytes:
    """An image file, lossless in 8 bits, without metadata.

    Args:
        array: values in [0, 1]; what lies outside is clipped.
    """
    levels = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    image = Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else np.ascontiguousarray(levels))
    file = BytesIO()
    image.save(file, image_format, **({"lossless": True} if image_format == "webp" else {}))
    return file.getvalue()


def _sniff(content: bytes) -> str:
    """Name of the Pillow plugin that may read the file."""
    for signature, plugin in _SIGNATURES:
        if content.startswith(signature):
            return plugin
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    foreign = next((name for signature, name in _FOREIGN.items() if content.startswith(signature)), None)
    if content[4:8] == b"ftyp":
        foreign = "HEIC or AVIF"
    if foreign:
        raise CodecError("unsupported_media_type", f"the content is {foreign}: send PNG, JPEG or WebP")
    raise CodecError("bad_image", f"not a PNG, JPEG or WebP image: {len(content)} bytes that begin with {content[:8]!r}")


def _pixels(modality: ImageModality, image: Image.Image) -> Float32[np.ndarray, "channels height width"]:
    upright = ImageOps.exif_transpose(image)
    flat = _flatten(upright, modality.background).convert("L" if modality.channels == 1 else "RGB")
    size = (modality.width, modality.height)
    if flat.size != size:
        # The largest centred box of the modality's aspect; its edges may fall between pixels.
        scale = min(flat.width / modality.width, flat.height / modality.height)
        left = max(0.0, (flat.width - scale * modality.width) / 2)  # rounding may leave -1e-16
        top = max(0.0, (flat.height - scale * modality.height) / 2)
        box = (left, top, flat.width - left, flat.height - top)
        flat = flat.resize(size, Image.Resampling.BICUBIC, box=box)
    channels_last = np.asarray(flat, dtype=np.float32).reshape(modality.height, modality.width, modality.channels)
    return np.ascontiguousarray(channels_last.transpose(2, 0, 1)) / np.float32(255)


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """The same picture in 8 bits a channel and without transparency."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image, dtype=np.float32) / 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)
