// A picture as an input: drawn, uploaded, pasted, dropped, sampled, made noisy.

import { element, knob } from "./dom.js";
import { blank, cover, decode } from "./picture.js";

const NIB = 1 / 11; // of the shorter side: about the stroke of handwriting that fills the picture

export class Sketch {
  /** @param changed called when the value did. `failed` is told why a file is no picture. */
  constructor(modality, changed, failed) {
    this.modality = modality;
    this.changed = changed;
    this.failed = failed;
    this.noise = 0;
    this.clean = blank(modality);
    this.canvas = blank(modality);
    this.field = gaussian(3 * modality.width * modality.height);
    this.nib = element("span", { class: "nib", hidden: true });
    const name = modality.name;
    Object.entries({
      class: "sketch",
      tabindex: 0,
      role: "application",
      "aria-label": `${name}: draw with the pointer, or move with the arrow keys and draw with space held down`,
    }).forEach(([key, value]) => this.canvas.setAttribute(key, value));
    this.file = element("input", {
      type: "file",
      accept: "image/*",
      hidden: true,
      onchange: () => this.take(this.file.files[0]),
    });
    this.ink =
      modality.channels === 3 ? element("input", { type: "color", value: "#e8b64c", "aria-label": `ink of ${name}` }) : null;
    this.erasing = element("input", { type: "checkbox" });
    this.level = knob(
      "Noise",
      { id: `noise-${name}`, min: 0, max: 1, step: 0.05, value: 0, format: (n) => n.toFixed(2) },
      (n) => {
        this.noise = n;
        this.touch();
      },
    );
    this.element = element(
      "div",
      { class: "drawing" },
      element("div", { class: "sheet" }, this.canvas, this.nib),
      element(
        "div",
        { class: "tools" },
        element(
          "button",
          { type: "button", class: "quiet", "aria-label": `Upload ${name}`, onclick: () => this.file.click() },
          "Upload",
        ),
        this.file,
        element("label", { class: "check" }, this.erasing, "Erase"),
        this.ink,
        this.level.whole,
      ),
    );
    this.listen();
    this.clear();
  }

  value() {
    return this.given ? { media_type: "image/png", data: this.canvas.toDataURL("image/png").split(",")[1] } : undefined;
  }

  clear() {
    this.given = false;
    this.noise = 0;
    this.level.set(0);
    this.clean.getContext("2d").drawImage(blank(this.modality), 0, 0);
    this.at = [this.canvas.width / 2, this.canvas.height / 2];
    this.render();
  }

  async set(value, noise = 0) {
    this.accept(await decode(value), noise);
  }

  /** A file of the user's. */
  async take(file) {
    if (!file) return;
    try {
      this.accept(await createImageBitmap(file));
      this.touch();
    } catch {
      this.failed(`${file.name || "this"} is not a picture that the browser can read`);
    }
    this.file.value = "";
  }

  accept(bitmap, noise = 0) {
    this.clean.getContext("2d").drawImage(blank(this.modality), 0, 0);
    cover(this.clean, bitmap);
    this.noise = noise;
    this.level.set(noise);
    this.given = true;
    this.render();
  }

  render() {
    const { width, height } = this.clean;
    const pixels = this.clean.getContext("2d").getImageData(0, 0, width, height);
    const grey = this.modality.channels === 1;
    for (let at = 0; at < width * height; at++) {
      let mean = 0;
      for (let c = 0; c < 3; c++) mean += pixels.data[4 * at + c] / 3;
      for (let c = 0; c < 3; c++) {
        const level = grey ? Math.round(mean) : pixels.data[4 * at + c];
        pixels.data[4 * at + c] = level + 255 * this.noise * this.field[3 * at + (grey ? 0 : c)]; // clamped by its type
      }
    }
    this.canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  /** The user did something to it. */
  touch() {
    this.given = true;
    this.render();
    this.changed();
  }

  stroke(to) {
    const context = this.clean.getContext("2d");
    const { background = "black" } = this.modality;
    const ink = this.ink ? this.ink.value : background === "black" ? "white" : "black";
    context.strokeStyle = this.erasing.checked ? background : ink;
    context.lineWidth = NIB * Math.min(this.clean.width, this.clean.height) * (this.erasing.checked ? 2 : 1);
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...this.at);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
    this.at = to;
    this.touch();
  }

  listen() {
    const { canvas } = this;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.x) / box.width) * canvas.width, ((event.clientY - box.y) / box.height) * canvas.height];
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.at = place(event);
      this.stroke(this.at);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (canvas.hasPointerCapture(event.pointerId)) for (const one of event.getCoalescedEvents()) this.stroke(place(one));
    });
    const held = new Set();
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      held.add(event.key);
      const to = [this.at[0] + step[0], this.at[1] + step[1]].map((v, i) =>
        Math.min(Math.max(v, 0), i ? canvas.height : canvas.width),
      );
      if (held.has(" ")) this.stroke(to);
      this.at = to;
      this.nib.hidden = false;
      this.nib.style.left = `${(100 * to[0]) / canvas.width}%`;
      this.nib.style.top = `${(100 * to[1]) / canvas.height}%`;
    });
    canvas.addEventListener("keyup", (event) => held.delete(event.key));
    canvas.addEventListener("blur", () => (held.clear(), (this.nib.hidden = true)));
  }
}

/** Standard normal numbers, the same each time: noise that holds still while one looks at it. */
function gaussian(count) {
  let state = 1;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return (((mixed ^ (mixed >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
  return Float32Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
}
