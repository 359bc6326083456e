// Inputs that are no pictures: each has an element, value(), set(value) and clear().

import { element } from "./dom.js";
import { show } from "./picture.js";

const MOST_CELLS = 64;

/** A text, or one of several classes. */
export class TextField {
  constructor(modality, changed) {
    const of = { "aria-label": modality.name, class: "wide" };
    this.input = modality.classes
      ? element(
          "select",
          { ...of, onchange: changed },
          element("option", { value: "" }, "not given"),
          ...modality.classes.map((name) => element("option", {}, name)),
        )
      : element("input", { ...of, type: "text", spellcheck: "false", autocomplete: "off", oninput: changed });
    this.element = this.input;
  }

  value() {
    return this.input.value.trim() ? this.input.value : undefined;
  }

  set(value) {
    this.input.value = value;
  }

  clear() {
    this.input.value = "";
  }
}

/** Numbers: a cell for each, or, where there are many, all of them in one field. */
export class VectorField {
  constructor(modality, changed) {
    this.many = modality.size > MOST_CELLS;
    this.cells = this.many
      ? [
          element("textarea", {
            rows: 5,
            class: "wide",
            "aria-label": `${modality.size} numbers of ${modality.name}`,
            oninput: changed,
          }),
        ]
      : Array.from({ length: modality.size }, (_, i) =>
          element("input", { type: "text", inputmode: "decimal", "aria-label": `${modality.name} ${i}`, oninput: changed }),
        );
    this.element = element("div", { class: this.many ? "" : "cells" }, ...this.cells);
  }

  value() {
    const written = this.many
      ? this.cells[0].value.split(/[\s,]+/).filter(Boolean)
      : this.cells.map((cell) => cell.value.trim());
    return written.some(Boolean)
      ? written.map((text) => (text !== "" && Number.isFinite(Number(text)) ? Number(text) : text || null))
      : undefined;
  }

  set(numbers) {
    const written = numbers.map((number) => String(Number(number.toPrecision(5))));
    if (this.many) this.cells[0].value = written.join(", ");
    else this.cells.forEach((cell, i) => (cell.value = written[i]));
  }

  clear() {
    for (const cell of this.cells) cell.value = "";
  }
}

/** Attributes: a switch for each. None is given until one is touched. */
export class Switches {
  constructor(modality, changed) {
    this.given = false;
    this.switches = modality.attributes.map((name) =>
      element("input", {
        type: "checkbox",
        role: "switch",
        name,
        onchange: () => ((this.given = true), this.mark(), changed()),
      }),
    );
    this.element = element(
      "div",
      { class: "switches" },
      ...this.switches.map((input) => element("label", { class: "check" }, input, input.name)),
    );
    this.mark();
  }

  value() {
    return this.given ? Object.fromEntries(this.switches.map((input) => [input.name, input.checked])) : undefined;
  }

  set(named) {
    this.given = true;
    for (const input of this.switches) input.checked = named[input.name];
    this.mark();
  }

  clear() {
    this.given = false;
    for (const input of this.switches) input.checked = false;
    this.mark();
  }

  mark() {
    this.element.classList.toggle("given", this.given);
  }
}

/** A picture of channels that nobody can draw: taken from the samples. */
export class Plate {
  constructor(modality) {
    this.modality = modality;
    this.element = element("div", { class: "plate" }, "Pick a sample.");
  }

  value() {
    return this.held;
  }

  set(value) {
    this.held = value;
    this.element.replaceChildren(show(this.modality, value, this.modality.name));
  }

  clear() {
    this.held = undefined;
    this.element.replaceChildren("Pick a sample.");
  }
}
