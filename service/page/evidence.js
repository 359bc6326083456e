// The inputs: a card for each modality of the bundle, any of which may stay empty.

import { element } from "./dom.js";
import { Plate, Switches, TextField, VectorField } from "./fields.js";
import { bars } from "./values.js";
import { drawable, show } from "./picture.js";
import { Sketch } from "./sketch.js";

export class Evidence {
  /** @param samples rows of wire values. `changed` is called whenever a value did. */
  constructor(place, modalities, samples, changed) {
    this.cards = new Map(modalities.map((modality) => [modality.name, new Card(modality, samples, changed)]));
    place.replaceChildren(...[...this.cards.values()].map((card) => card.element));
    for (const type of ["dragover", "drop"]) {
      place.addEventListener(type, (event) => event.preventDefault());
    }
  }

  /** What is given: {name: wire value}. */
  given() {
    const values = [...this.cards].map(([name, card]) => [name, card.input.value()]);
    return Object.fromEntries(values.filter(([, value]) => value !== undefined));
  }

  /** Give exactly this: {name: wire value}; `noise` is of pictures, by name. */
  async give(values, noise = {}) {
    for (const [name, card] of this.cards) {
      if (name in values) await card.input.set(values[name], noise[name]);
      else card.input.clear();
    }
    this.mark();
  }

  mark() {
    for (const card of this.cards.values()) card.mark();
  }

  /** A picture from the clipboard goes where the focus is, else to the first modality that takes one. */
  paste(file) {
    const takers = [...this.cards.values()].filter((card) => card.input.take);
    (takers.find((card) => card.element.contains(document.activeElement)) ?? takers[0])?.input.take(file);
  }

  /** Put a fault beside the input it is of. Returns whether there is one of this name. */
  blame(name, detail) {
    const card = this.cards.get(name);
    card?.fault(detail);
    return Boolean(card);
  }

  forgive() {
    for (const card of this.cards.values()) card.fault("");
  }
}

class Card {
  constructor(modality, samples, changed) {
    this.modality = modality;
    const told = () => (this.mark(), changed());
    this.input = control(modality, told, (detail) => this.fault(detail));
    this.flaw = element("p", { class: "fault", role: "alert", hidden: true });
    this.state = element("span", { class: "state" });
    const id = `card-${modality.name}`;
    const clear = element(
      "button",
      {
        type: "button",
        class: "quiet",
        "aria-label": `Leave ${modality.name} empty`,
        onclick: () => (this.input.clear(), told()),
      },
      "Clear",
    );
    this.element = element(
      "section",
      { class: `card ${modality.kind}`, "aria-labelledby": id },
      element(
        "header",
        {},
        element("h3", { id }, modality.name),
        element("span", { class: "kind" }, describe(modality)),
        this.state,
        clear,
      ),
      this.input.element,
      this.flaw,
      this.offer(samples, told),
    );
    this.element.addEventListener("drop", (event) => {
      const file = event.dataTransfer.files[0];
      if (file && this.input.take) this.input.take(file);
    });
    this.mark();
  }

  mark() {
    const given = this.input?.value() !== undefined;
    this.state && (this.state.textContent = given ? "given" : "empty");
    this.element?.classList.toggle("given", given);
  }

  fault(detail) {
    this.flaw.textContent = detail;
    this.flaw.hidden = !detail;
    this.element.classList.toggle("wrong", Boolean(detail));
  }

  /** Samples to pick: what the bundle ships, without repetition. */
  offer(samples, told) {
    const { name } = this.modality;
    const values = [...new Map(samples.map((row) => [JSON.stringify(row[name]), row[name]])).values()].filter((v) => v !== "");
    const buttons = values.map((value, i) =>
      element(
        "button",
        {
          type: "button",
          class: "sample",
          "aria-label": `sample ${i + 1} of ${name}`,
          onclick: async () => (await this.input.set(value), told()),
        },
        preview(this.modality, value, i),
      ),
    );
    return element(
      "div",
      { class: "samples", role: "group", "aria-label": `Samples of ${name}`, hidden: !buttons.length },
      ...buttons,
    );
  }
}

function control(modality, changed, failed) {
  if (modality.kind === "image") return drawable(modality) ? new Sketch(modality, changed, failed) : new Plate(modality);
  if (modality.kind === "vector") return new VectorField(modality, changed);
  return modality.kind === "binary" ? new Switches(modality, changed) : new TextField(modality, changed);
}

function preview(modality, value, index) {
  if (modality.kind === "image") return show(modality, value, "");
  if (modality.kind === "vector") return bars(value.slice(0, 24), "");
  return typeof value === "string" ? value : String(index + 1);
}

function describe(modality) {
  const { kind, height, width, channels, size, length, unit, attributes, classes } = modality;
  if (kind === "image")
    return `${width} × ${height} ${channels === 1 ? "grey" : channels === 3 ? "RGB" : `of ${channels} channels`}`;
  if (kind === "text") return `up to ${length} ${unit ?? "character"}s`;
  if (kind === "vector") return `${size} numbers`;
  return attributes ? `${attributes.length} attributes` : `one of ${classes.length}`;
}
