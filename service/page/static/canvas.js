// Input control of an image: draw it, upload, paste or drop a file, and add noise.

import { element, numberControl } from "./dom.js";
import { blankCanvas, drawCentreCrop, loadBitmap } from "./images.js";

const PEN_WIDTH = 1 / 11; // of the shorter side: about the stroke width of the handwritten digits
const ERASER_SCALE = 2; // width relative to the pen's
const DEFAULT_COLOR = "#e8b64c";

const KEY_STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };

/** Has the interface of the controls in fields.js, and `loadFile(file)`. */
export class DrawingCanvas {
  /**
   * @param {import("./api.js").Modality} modality an image of 1 or 3 channels
   * @param {() => void} onChange runs when the user changes the image
   * @param {(detail: string) => void} onError runs with a message when a file is not an image
   */
  constructor(modality, onChange, onError) {
    this.modality = modality;
    this.onChange = onChange;
    this.onError = onError;
    this.hasValue = false;
    this.noise = 0;
    this.source = blankCanvas(modality); // the image without noise
    this.canvas = blankCanvas(modality); // the image with noise
    this.noiseField = standardNormals(3 * modality.width * modality.height);
    this.keyboardCursor = element("span", { class: "keyboard-cursor", hidden: true });
    const { name } = modality;
    Object.entries({
      class: "drawing-canvas",
      tabindex: 0,
      role: "application",
      "aria-label": `${name}: draw with the pointer, or move with the arrow keys and draw with space held down`,
    }).forEach(([attribute, value]) => this.canvas.setAttribute(attribute, value));
    this.fileInput = element("input", {
      type: "file",
      accept: "image/*",
      hidden: true,
      onchange: () => this.loadFile(this.fileInput.files[0]),
    });
    this.colorInput =
      modality.channels === 3
        ? element("input", { type: "color", value: DEFAULT_COLOR, "aria-label": `Pen colour of ${name}` })
        : null;
    this.eraserInput = element("input", { type: "checkbox" });
    this.noiseControl = numberControl(
      "Noise",
      { id: `noise-${name}`, min: 0, max: 1, step: 0.05, value: 0, format: (noise) => noise.toFixed(2) },
      (noise) => {
        this.noise = noise;
        this.commitChange();
      },
    );
    this.element = element(
      "div",
      { class: "drawing" },
      element("div", { class: "canvas-frame" }, this.canvas, this.keyboardCursor),
      element(
        "div",
        { class: "drawing-tools" },
        element(
          "button",
          { type: "button", class: "link-button", "aria-label": `Upload ${name}`, onclick: () => this.fileInput.click() },
          "Upload",
        ),
        this.fileInput,
        element("label", { class: "checkbox-label" }, this.eraserInput, "Erase"),
        this.colorInput,
        this.noiseControl.root,
      ),
    );
    this.addPointerListeners();
    this.addKeyboardListeners();
    this.clear();
  }

  value() {
    return this.hasValue ? { media_type: "image/png", data: this.canvas.toDataURL("image/png").split(",")[1] } : undefined;
  }

  clear() {
    this.hasValue = false;
    this.noise = 0;
    this.noiseControl.set(0);
    this.source.getContext("2d").drawImage(blankCanvas(this.modality), 0, 0);
    this.position = [this.canvas.width / 2, this.canvas.height / 2];
    this.render();
  }

  async set(value, noise = 0) {
    this.setBitmap(await loadBitmap(value), noise);
  }

  /** Loads an image file of the user's. */
  async loadFile(file) {
    if (!file) return;
    try {
      this.setBitmap(await createImageBitmap(file));
      this.commitChange();
    } catch {
      this.onError(`${file.name || "this file"} is not an image that the browser can read`);
    }
    this.fileInput.value = "";
  }

  setBitmap(bitmap, noise = 0) {
    this.source.getContext("2d").drawImage(blankCanvas(this.modality), 0, 0);
    drawCentreCrop(this.source, bitmap);
    this.noise = noise;
    this.noiseControl.set(noise);
    this.hasValue = true;
    this.render();
  }

  /** Draws the source with noise. A modality of one channel is drawn in grey. */
  render() {
    const { width, height } = this.source;
    const pixels = this.source.getContext("2d").getImageData(0, 0, width, height);
    const grey = this.modality.channels === 1;
    for (let i = 0; i < width * height; i++) {
      let mean = 0;
      for (let c = 0; c < 3; c++) mean += pixels.data[4 * i + c] / 3;
      for (let c = 0; c < 3; c++) {
        const level = grey ? Math.round(mean) : pixels.data[4 * i + c];
        // The array clamps to [0, 255].
        pixels.data[4 * i + c] = level + 255 * this.noise * this.noiseField[3 * i + (grey ? 0 : c)];
      }
    }
    this.canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  /** Shows a change by the user and reports it. */
  commitChange() {
    this.hasValue = true;
    this.render();
    this.onChange();
  }

  /** Draws or erases a line from the last position. */
  drawLineTo(position) {
    const context = this.source.getContext("2d");
    const { background = "black" } = this.modality;
    const penColor = this.colorInput ? this.colorInput.value : background === "black" ? "white" : "black";
    const erase = this.eraserInput.checked;
    context.strokeStyle = erase ? background : penColor;
    context.lineWidth = PEN_WIDTH * Math.min(this.source.width, this.source.height) * (erase ? ERASER_SCALE : 1);
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...this.position);
    context.lineTo(position[0] + 0.01, position[1]); // a line of length zero would draw nothing
    context.stroke();
    this.position = position;
    this.commitChange();
  }

  addPointerListeners() {
    const { canvas } = this;
    const toPixels = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.x) / box.width) * canvas.width, ((event.clientY - box.y) / box.height) * canvas.height];
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.position = toPixels(event);
      this.drawLineTo(this.position);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!canvas.hasPointerCapture(event.pointerId)) return;
      for (const move of event.getCoalescedEvents()) this.drawLineTo(toPixels(move));
    });
  }

  addKeyboardListeners() {
    const { canvas } = this;
    const pressedKeys = new Set();
    canvas.addEventListener("keydown", (event) => {
      const step = KEY_STEPS[event.key];
      if (!step) return;
      event.preventDefault();
      pressedKeys.add(event.key);
      const limits = [canvas.width, canvas.height];
      const position = this.position.map((coordinate, i) => Math.min(Math.max(coordinate + step[i], 0), limits[i]));
      if (pressedKeys.has(" ")) this.drawLineTo(position);
      this.position = position;
      this.keyboardCursor.hidden = false;
      this.keyboardCursor.style.left = `${(100 * position[0]) / canvas.width}%`;
      this.keyboardCursor.style.top = `${(100 * position[1]) / canvas.height}%`;
    });
    canvas.addEventListener("keyup", (event) => pressedKeys.delete(event.key));
    canvas.addEventListener("blur", () => (pressedKeys.clear(), (this.keyboardCursor.hidden = true)));
  }
}

/**
 * Returns standard normal numbers from a fixed seed (mulberry32 and Box-Muller). The noise stays the same while the user
 * changes its level.
 */
function standardNormals(count) {
  let state = 1;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return (((mixed ^ (mixed >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
  return Float32Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
}
