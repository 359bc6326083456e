// A generated value, shown. One function for each kind of modality.

import { bar, element } from "./dom.js";
import { show as picture } from "./picture.js";

const SHOWN_ATTRIBUTES = 12;

export function show(modality, value, label) {
  if (modality.kind === "image") return picture(modality, value, label);
  if (modality.kind === "text") return said(value.text, label);
  if (modality.kind === "categorical") return said(value.class, label);
  return modality.kind === "vector" ? bars(value.data, label) : probabilities(value.data);
}

function said(text, label) {
  return element("p", { class: text ? "said" : "said hint", title: label }, text || "nothing");
}

/** Numbers around zero. */
export function bars(numbers, label) {
  const most = Math.max(...numbers.map(Math.abs), 1e-9);
  const list = element("div", {
    class: "bars",
    role: "img",
    "aria-label": `${label} ${numbers
      .slice(0, 64)
      .map((n) => n.toFixed(2))
      .join(", ")}`,
  });
  for (const number of numbers) {
    const one = element("i", { title: number.toFixed(3) });
    one.style.height = `${(50 * Math.abs(number)) / most}%`;
    one.style[number < 0 ? "top" : "bottom"] = "50%";
    list.append(element("span", {}, one));
  }
  return list;
}

/** Names with their probabilities, the likeliest first where there are many. */
function probabilities(named) {
  let entries = Object.entries(named);
  const more = entries.length - SHOWN_ATTRIBUTES;
  if (more > 0) entries = entries.sort((a, b) => b[1] - a[1]).slice(0, SHOWN_ATTRIBUTES);
  const rows = entries.map(([name, p]) =>
    element("li", {}, element("span", {}, name), bar(p), element("span", { class: "number" }, p.toFixed(2))),
  );
  return element("ul", { class: "odds" }, ...rows, more > 0 ? element("li", {}, `and ${more} less likely`) : null);
}
