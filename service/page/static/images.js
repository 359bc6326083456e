// Converts images between JSON values, canvases and elements.

import { element } from "./dom.js";

/** Whether a canvas can hold images of this modality. Other images are raw numbers: {data, shape, dtype}. */
export const isDrawable = (modality) => modality.channels === 1 || modality.channels === 3;

/** Creates a canvas that is filled with the modality's background. */
export function blankCanvas(modality) {
  const canvas = element("canvas", { width: modality.width, height: modality.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = modality.background ?? "black";
  context.fillRect(0, 0, canvas.width, canvas.height);
  return canvas;
}

/** Draws the largest centred crop that has the canvas's aspect ratio. The service crops images in the same way. */
export function drawCentreCrop(canvas, bitmap) {
  const scale = Math.max(canvas.width / bitmap.width, canvas.height / bitmap.height);
  const [width, height] = [canvas.width / scale, canvas.height / scale];
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(
    bitmap,
    (bitmap.width - width) / 2,
    (bitmap.height - height) / 2,
    width,
    height,
    0,
    0,
    canvas.width,
    canvas.height,
  );
}

/**
 * @param {{media_type: string, data: string}} value an image file in base64
 * @returns {Promise<ImageBitmap>}
 */
export function loadBitmap({ media_type, data }) {
  return createImageBitmap(new Blob([bytesFromBase64(data)], { type: media_type }));
}

/**
 * Creates an element that shows an image.
 *
 * @param {import("./api.js").Modality} modality
 * @param {{media_type?: string, data: string}} value an image file, or raw float32 numbers (channel, y, x), in base64
 * @param {string} label text for screen readers; "" for a decorative image
 */
export function renderImage(modality, value, label) {
  if (value.media_type) {
    return element("img", {
      src: `data:${value.media_type};base64,${value.data}`,
      alt: label,
      decoding: "sync",
      width: modality.width,
      height: modality.height,
    });
  }
  return renderChannels(modality, new Float32Array(bytesFromBase64(value.data).buffer), label);
}

/** Creates a canvas with the channels next to each other in grey. `numbers` is (channel, y, x), in [0, 1]. */
export function renderChannels({ channels, width, height }, numbers, label) {
  const canvas = element("canvas", {
    width: width * channels,
    height,
    ...(label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" }),
  });
  const pixels = new ImageData(width * channels, height);
  for (let i = 0; i < numbers.length; i++) {
    const [channel, y, x] = [Math.floor(i / (width * height)), Math.floor(i / width) % height, i % width];
    pixels.data.set([...Array(3).fill(255 * numbers[i]), 255], 4 * (y * width * channels + channel * width + x));
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

export function bytesFromBase64(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}
