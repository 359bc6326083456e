// Input controls of all modalities that cannot be drawn. Each control has `element`, `value()`, `set(value)` and `clear()`.
// `value()` returns the JSON value for a request, or undefined if the input is empty.

import { element } from "./dom.js";
import { renderImage } from "./images.js";
import { plural } from "./text.js";

const MAX_NUMBER_FIELDS = 64;

export class TextField {
  constructor(modality, onChange) {
    this.element = element("input", {
      type: "text",
      class: "full-width",
      "aria-label": modality.name,
      spellcheck: "false",
      autocomplete: "off",
      oninput: onChange,
    });
  }

  value() {
    return this.element.value.trim() ? this.element.value : undefined;
  }

  set(value) {
    this.element.value = value;
  }

  clear() {
    this.element.value = "";
  }
}

/** A field for each number of a vector, or one text area if there are many numbers. */
export class VectorField {
  constructor(modality, onChange) {
    this.singleField = modality.size > MAX_NUMBER_FIELDS;
    this.fields = this.singleField
      ? [
          element("textarea", {
            rows: 5,
            class: "full-width",
            "aria-label": `${plural(modality.size, "number")} of ${modality.name}`,
            oninput: onChange,
          }),
        ]
      : Array.from({ length: modality.size }, (_, i) =>
          element("input", {
            type: "text",
            inputmode: "decimal",
            "aria-label": modality.size === 1 ? modality.name : `${modality.name} ${i}`,
            oninput: onChange,
          }),
        );
    this.element = element("div", { class: this.singleField ? "" : "number-fields" }, ...this.fields);
  }

  /** A text that is not a number is sent as it is, and an empty field as null. The service returns the error message. */
  value() {
    const texts = this.singleField
      ? this.fields[0].value.split(/[\s,]+/).filter(Boolean)
      : this.fields.map((field) => field.value.trim());
    return texts.some(Boolean)
      ? texts.map((text) => (text !== "" && Number.isFinite(Number(text)) ? Number(text) : text || null))
      : undefined;
  }

  set(numbers) {
    const texts = numbers.map(String);
    if (this.singleField) this.fields[0].value = texts.join(", ");
    else this.fields.forEach((field, i) => (field.value = texts[i]));
  }

  clear() {
    for (const field of this.fields) field.value = "";
  }
}

/** A switch for each attribute. The input is empty until the user touches a switch. */
export class AttributeSwitches {
  constructor(modality, onChange) {
    this.hasValue = false;
    this.switches = modality.attributes.map((name) =>
      element("input", {
        type: "checkbox",
        role: "switch",
        name,
        onchange: () => ((this.hasValue = true), this.updateStyle(), onChange()),
      }),
    );
    this.element = element(
      "div",
      { class: "switches" },
      ...this.switches.map((input) => element("label", { class: "checkbox-label" }, input, input.name)),
    );
    this.updateStyle();
  }

  value() {
    return this.hasValue ? Object.fromEntries(this.switches.map((input) => [input.name, input.checked])) : undefined;
  }

  set(value) {
    this.hasValue = true;
    for (const input of this.switches) input.checked = value[input.name];
    this.updateStyle();
  }

  clear() {
    this.hasValue = false;
    for (const input of this.switches) input.checked = false;
    this.updateStyle();
  }

  updateStyle() {
    this.element.classList.toggle("has-value", this.hasValue);
  }
}

/** An image with channels that a canvas cannot hold. The user can only pick an example. */
export class ExampleImage {
  constructor(modality) {
    this.modality = modality;
    this.element = element("div", { class: "example-image" }, "Pick an example.");
  }

  value() {
    return this.current;
  }

  set(value) {
    this.current = value;
    this.element.replaceChildren(renderImage(this.modality, value, this.modality.name));
  }

  clear() {
    this.current = undefined;
    this.element.replaceChildren("Pick an example.");
  }
}
