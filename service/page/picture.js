// Pictures: between the wire, the canvas and the eye.

import { element } from "./dom.js";

/** Whether a canvas can hold pictures of this modality; others travel as plain numbers. */
export const drawable = (modality) => modality.channels === 1 || modality.channels === 3;

/** A canvas filled with the modality's background. */
export function blank(modality) {
  const canvas = element("canvas", { width: modality.width, height: modality.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = modality.background ?? "black";
  context.fillRect(0, 0, canvas.width, canvas.height);
  return canvas;
}

/** Draw the largest centred box of the canvas's aspect: what the service does with a picture of another size. */
export function cover(canvas, bitmap) {
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

/** The bitmap of {media_type, data}. */
export function decode({ media_type, data }) {
  return createImageBitmap(new Blob([bytes(data)], { type: media_type }));
}

/** An element that shows a generated or sampled picture. */
export function show(modality, value, label) {
  if (value.media_type) {
    return element("img", {
      src: `data:${value.media_type};base64,${value.data}`,
      alt: label,
      decoding: "sync",
      width: modality.width,
      height: modality.height,
    });
  }
  return channels(modality, new Float32Array(bytes(value.data).buffer), label);
}

/** Channels that no eye has, side by side in grey. */
function channels({ channels: count, width, height }, numbers, label) {
  const canvas = element("canvas", {
    width: width * count,
    height,
    ...(label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" }),
  });
  const pixels = new ImageData(width * count, height);
  for (let at = 0; at < numbers.length; at++) {
    const [channel, y, x] = [Math.floor(at / (width * height)), Math.floor(at / width) % height, at % width];
    pixels.data.set([...Array(3).fill(255 * numbers[at]), 255], 4 * (y * width * count + channel * width + x));
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}
