// Creates elements by the DOM API. The page never parses a string as HTML.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/**
 * Creates an HTML element.
 *
 * @param {string} tag
 * @param {Object<string, any>} attributes names that start with "on" are event listeners; null, undefined and false are left out
 * @param {...(Node | string | null)} children null is left out
 */
export function element(tag, attributes = {}, ...children) {
  return configure(document.createElement(tag), attributes, children);
}

/** Creates an SVG element. The parameters are those of `element`. */
export function svgElement(tag, attributes = {}, ...children) {
  return configure(document.createElementNS(SVG_NAMESPACE, tag), attributes, children);
}

/** Creates a bar of a fraction in [0, 1]. Screen readers skip it: show the number next to it. */
export function bar(fraction) {
  const fill = element("i");
  fill.style.width = `${100 * fraction}%`;
  return element("span", { class: "bar", "aria-hidden": "true" }, fill);
}

/**
 * Creates a labelled range or number input. A range input shows its value in its label.
 *
 * @param {string} label
 * @param {object} options `id`, `type`, `min`, `max`, `step` and `value` of the input; `format` turns a number into text
 * @param {(value: number) => void} onChange runs when the user changes the value
 * @returns {{root: HTMLElement, input: HTMLInputElement, set: (value: number) => void}} `root` also has a hidden element
 *   `<id>-error` for an error message
 */
export function numberControl(label, { id, type = "range", min, max, step, value, format = String }, onChange) {
  const output = element("output", { for: id });
  const input = element("input", { id, type, min, max, step, value, "aria-describedby": `${id}-error` });
  const updateOutput = () => (output.textContent = type === "range" ? format(Number(input.value)) : "");
  input.addEventListener("input", () => (updateOutput(), onChange(Number(input.value))));
  updateOutput();
  const root = element(
    "div",
    { class: "number-control" },
    element("label", { for: id }, label, output),
    input,
    element("p", { id: `${id}-error`, class: "field-error", hidden: true }),
  );
  return { root, input, set: (number) => ((input.value = number), updateOutput()) };
}

function configure(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
