// The input control of a class: a combobox that lists the classes that contain the typed text.
// Source: the pattern "Editable Combobox With List Autocomplete" of the WAI-ARIA Authoring Practices Guide.

import { element } from "./dom.js";
import { plural } from "./text.js";

const MAX_OPTIONS = 200; // typing narrows a longer list

/** A control as in fields.js. A text that is no class is sent as it is: the service returns the error message. */
export class ClassField {
  constructor({ name, classes }, onChange) {
    this.classes = classes;
    this.onChange = onChange;
    this.current = "";
    this.listId = `classes-${name}`;
    this.input = element("input", {
      type: "text",
      role: "combobox",
      class: "full-width",
      "aria-label": name,
      "aria-autocomplete": "list",
      "aria-controls": this.listId,
      "aria-expanded": "false",
      placeholder: "Search or pick",
      spellcheck: "false",
      autocomplete: "off",
      onclick: () => this.openAtCurrent(),
      oninput: () => this.open(this.input.value, this.input.value.trim() ? 0 : -1),
      onkeydown: (event) => this.handleKey(event),
      onblur: () => this.commit(this.input.value),
    });
    this.list = element("ul", {
      id: this.listId,
      role: "listbox",
      "aria-label": `Classes of ${name}`,
      onclick: ({ target }) => target.role === "option" && this.commit(target.textContent),
    });
    this.summary = element("p", { class: "hint", role: "status" });
    // Without preventDefault, a click on an option or on the scroll bar would take the focus, which closes the list.
    const keepFocus = (event) => event.preventDefault();
    this.popup = element("div", { class: "class-list", hidden: true, onmousedown: keepFocus }, this.list, this.summary);
    this.element = element("div", { class: "class-field" }, this.input, this.popup);
  }

  value() {
    return this.current || undefined;
  }

  set(name) {
    this.input.value = this.current = name;
    this.popup.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }

  clear() {
    this.set("");
  }

  /** Takes the text as the value. It may differ from the class in case and accents. */
  commit(text) {
    const previous = this.current;
    const matches = this.classes.includes(text) ? [text] : this.classes.filter((name) => fold(name) === fold(text));
    this.set(matches.length === 1 ? matches[0] : text.trim());
    if (this.current !== previous) this.onChange();
  }

  handleKey(event) {
    const isOpen = !this.popup.hidden;
    if (event.isComposing) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (isOpen) this.move(event.key === "ArrowDown" ? 1 : -1);
      else this.openAtCurrent();
    } else if (event.key === "Enter") {
      this.commit((isOpen && this.list.children[this.active]?.textContent) || this.input.value);
    } else if (event.key === "Escape" && isOpen) {
      this.set(this.current);
    } else {
      return;
    }
    event.preventDefault();
  }

  openAtCurrent() {
    this.open("", this.classes.indexOf(this.current));
  }

  /** Lists the classes that contain the text, those that start with it first, and highlights one option; -1 is none. */
  open(text, active) {
    const query = fold(text);
    const found = this.classes.filter((name) => fold(name).includes(query));
    const isStart = (name) => fold(name).startsWith(query);
    const names = [...found.filter(isStart), ...found.filter((name) => !isStart(name))].slice(0, MAX_OPTIONS);
    const options = names.map((name, i) => element("li", { id: `${this.listId}-${i}`, role: "option" }, name));
    this.popup.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.list.replaceChildren(...options);
    this.list.hidden = !names.length; // a list box without options is invalid
    this.summary.textContent = names.length
      ? `${names.length} of ${plural(this.classes.length, "class", "classes")}`
      : `no class contains “${text.trim()}”`;
    this.highlight(active);
  }

  move(step) {
    const count = this.list.children.length;
    this.highlight(this.active < 0 && step < 0 ? count - 1 : (this.active + step + count) % count);
  }

  /** Highlights an option of the open list. An index without an option highlights none. */
  highlight(active) {
    this.active = active;
    [...this.list.children].forEach((option, i) => option.setAttribute("aria-selected", String(i === active)));
    const option = this.list.children[active];
    option?.scrollIntoView({ block: "nearest" });
    if (option) this.input.setAttribute("aria-activedescendant", option.id);
    else this.input.removeAttribute("aria-activedescendant");
  }
}

/** For comparisons that ignore case, accents and surrounding blanks. */
const fold = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase().trim();
