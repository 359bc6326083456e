// The "Inputs" section: a card for each modality of the model. Every input is optional.

import { DrawingCanvas } from "./canvas.js";
import { ClassField } from "./class-field.js";
import { element } from "./dom.js";
import { EncodedField } from "./encoded-field.js";
import { AttributeSwitches, ExampleImage, TextField, VectorField } from "./fields.js";
import { isDrawable, renderImage } from "./images.js";
import { SoundField } from "./sounds.js";
import { plural, shorten } from "./text.js";
import { renderNumbers } from "./values.js";

const MAX_PREVIEW_NUMBERS = 24;
const MAX_PREVIEW_CHARACTERS = 32;
const MAX_EXAMPLES = 12; // two rows of images

export class InputsPanel {
  /**
   * @param {HTMLElement} container
   * @param {import("./api.js").Modality[]} modalities
   * @param {import("./api.js").Inputs[]} examples example inputs of the bundle
   * @param {() => void} onChange runs when the user changes an input
   */
  constructor(container, modalities, examples, onChange) {
    this.cards = new Map(modalities.map((modality) => [modality.name, new InputCard(modality, examples, onChange)]));
    container.replaceChildren(...[...this.cards.values()].map((card) => card.element));
    // Without this, a file that is dropped next to a card would replace the page.
    for (const type of ["dragover", "drop"]) {
      container.addEventListener(type, (event) => event.preventDefault());
    }
  }

  /** @returns {import("./api.js").Inputs} the inputs that are not empty */
  values() {
    const entries = [...this.cards].map(([name, card]) => [name, card.control.value()]);
    return Object.fromEntries(entries.filter(([, value]) => value !== undefined));
  }

  /**
   * Replaces all inputs.
   *
   * @param {import("./api.js").Inputs} values modalities that are missing become empty
   * @param {Object<string, number>} noise noise level of image inputs, by modality
   */
  async setValues(values, noise = {}) {
    for (const [name, card] of this.cards) {
      if (name in values) await card.control.set(values[name], noise[name]);
      else card.control.clear();
    }
    for (const card of this.cards.values()) card.updateStyle();
  }

  /** Loads a file from the clipboard into the card that has the focus, or else into the first card that accepts files. */
  paste(file) {
    const cards = [...this.cards.values()].filter((card) => card.control.loadFile);
    (cards.find((card) => card.element.contains(document.activeElement)) ?? cards[0])?.control.loadFile(file);
  }

  /** Shows an error message at the input. Returns whether there is a modality of this name. */
  showError(name, detail) {
    const card = this.cards.get(name);
    card?.showError(detail);
    return Boolean(card);
  }

  clearErrors() {
    for (const card of this.cards.values()) card.showError("");
  }
}

class InputCard {
  constructor(modality, examples, onChange) {
    this.modality = modality;
    this.onChange = () => (this.updateStyle(), onChange());
    this.control = makeControl(modality, this.onChange, (detail) => this.showError(detail));
    this.error = element("p", { class: "field-error", role: "alert", hidden: true });
    const headingId = `input-${modality.name}`;
    const clearButton = element(
      "button",
      {
        type: "button",
        class: "link-button",
        "aria-label": `Clear ${modality.name}`,
        onclick: () => (this.control.clear(), this.onChange()),
      },
      "Clear",
    );
    this.element = element(
      "section",
      { class: `input-card ${modality.kind}`, "aria-labelledby": headingId },
      element(
        "header",
        {},
        element("h3", { id: headingId }, modality.name),
        element("span", { class: "format" }, describeFormat(modality)),
        clearButton,
      ),
      this.control.element,
      this.error,
      this.exampleButtons(examples),
    );
    this.element.addEventListener("drop", (event) => {
      const file = event.dataTransfer.files[0];
      if (file && this.control.loadFile) this.control.loadFile(file);
    });
    this.updateStyle();
  }

  updateStyle() {
    this.element.classList.toggle("has-value", this.control.value() !== undefined);
  }

  /** @param {string} detail the message; "" hides it */
  showError(detail) {
    this.error.textContent = detail;
    this.error.hidden = !detail;
  }

  /** Creates buttons for the first distinct values of the modality in the bundle's examples. */
  exampleButtons(examples) {
    const { name } = this.modality;
    const distinct = new Map(examples.map((row) => [JSON.stringify(row[name]), row[name]]));
    const values = [...distinct.values()].filter((value) => value !== "").slice(0, MAX_EXAMPLES);
    const buttons = values.map((value, i) =>
      element(
        "button",
        {
          type: "button",
          class: "input-example",
          "aria-label": `${name}, example ${i + 1}${typeof value === "string" ? `: ${value}` : ""}`,
          title: typeof value === "string" ? value : null,
          onclick: async () => (await this.control.set(value), this.onChange()),
        },
        renderPreview(this.modality, value, i),
      ),
    );
    return element(
      "div",
      { class: "input-examples", role: "group", "aria-label": `Examples of ${name}`, hidden: !buttons.length },
      ...buttons,
    );
  }
}

function makeControl(modality, onChange, onError) {
  if (modality.encoder) return new EncodedField(modality, onChange, onError);
  if (modality.kind === "image") {
    return isDrawable(modality) ? new DrawingCanvas(modality, onChange, onError) : new ExampleImage(modality);
  }
  if (modality.kind === "audio") return new SoundField(modality, onChange, onError);
  if (modality.kind === "vector") return new VectorField(modality, onChange);
  if (modality.kind === "categorical") return new ClassField(modality, onChange);
  return modality.kind === "binary" ? new AttributeSwitches(modality, onChange) : new TextField(modality, onChange);
}

function renderPreview(modality, value, index) {
  if (modality.encoder) return renderNumbers(modality, value.slice(0, MAX_PREVIEW_NUMBERS), "");
  if (modality.kind === "image") return renderImage(modality, value, "");
  if (modality.kind === "vector") return renderNumbers(modality, value.slice(0, MAX_PREVIEW_NUMBERS), "");
  return typeof value === "string" ? shorten(value, MAX_PREVIEW_CHARACTERS) : String(index + 1);
}

function describeFormat(modality) {
  const { kind, height, width, channels, size, length, unit, attributes, classes, seconds, sample_rate } = modality;
  if (modality.encoder) return kind === "image" ? "a picture of any size" : "a text";
  if (kind === "image") {
    const colors = { 1: "grey", 3: "RGB" }[channels] ?? `with ${plural(channels, "channel")}`;
    return `${width} × ${height} ${colors}`;
  }
  if (kind === "audio") return `${seconds} s at ${sample_rate / 1000} kHz`;
  if (kind === "text") return `up to ${plural(length, unit ?? "character")}`;
  if (kind === "vector") return plural(size, "number");
  return attributes ? plural(attributes.length, "attribute") : `one of ${plural(classes.length, "class", "classes")}`;
}
