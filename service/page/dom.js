// Elements from code. Nothing on this page is ever parsed as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `attributes` that start with "on" are listeners; null and false leave an attribute out. */
export function element(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function drawn(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), attributes, children);
}

/** A bar for a part of 1. The number stands beside it. */
export function bar(part) {
  const filled = element("i");
  filled.style.width = `${100 * part}%`;
  return element("span", { class: "bar", "aria-hidden": "true" }, filled);
}

/** A range or number input with its label and the value beside it. `changed` is told the number. */
export function knob(label, { id, type = "range", min, max, step, value, format = String }, changed) {
  const shown = element("output", { for: id });
  const input = element("input", { id, type, min, max, step, value, "aria-describedby": `${id}-fault` });
  const show = () => (shown.textContent = type === "range" ? format(Number(input.value)) : "");
  input.addEventListener("input", () => (show(), changed(Number(input.value))));
  show();
  const whole = element(
    "div",
    { class: "knob" },
    element("label", { for: id }, label, shown),
    input,
    element("p", { id: `${id}-fault`, class: "fault", hidden: true }),
  );
  return { whole, input, set: (number) => ((input.value = number), show()) };
}

function furnish(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}
