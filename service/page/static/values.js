// Shows one value, with one function for each kind of modality.

import { bar, element } from "./dom.js";
import { renderImage } from "./images.js";
import { renderSound } from "./sounds.js";

const MAX_ATTRIBUTES = 12;
const MAX_NUMBERS = 8; // more numbers are a bar chart
const MAX_NUMBERS_IN_LABEL = 64;
const DIGITS = 3; // of a number, down from the first digit of its standard deviation

/**
 * Creates an element for a generated value, as in the response of POST /cross-generate.
 *
 * @param {import("./api.js").Modality} modality
 * @param {object} value
 * @param {string} label text for screen readers
 */
export function renderValue(modality, value, label) {
  if (modality.encoder) return renderNumbers(modality, value.data, label);
  if (modality.kind === "image") return renderImage(modality, value, label);
  if (modality.kind === "audio") return renderSound(value, label);
  if (modality.kind === "text") return renderText(value.text, label);
  if (modality.kind === "categorical") return renderText(value.class, label);
  return modality.kind === "vector" ? renderNumbers(modality, value.data, label) : renderProbabilities(value.data);
}

/**
 * Creates elements for a training example, as in the response of POST /cross-generate: its picture or texts, or else its id.
 *
 * @param {{id: string, similarity: number, values: object[]}} example
 */
export function renderExample({ id, similarity, values }) {
  const label = `${id}, similarity ${similarity.toFixed(2)}`;
  if (!values.length) return [renderText(id, label)];
  return values.map((value) => ("text" in value ? renderText(value.text, label) : renderImage(value, value, label)));
}

function renderText(text, label) {
  return element("p", { class: text ? "text-value" : "text-value hint", title: label }, text || "(empty)");
}

/** Creates an element for the numbers of a vector, or for its first ones: the numbers, or a bar chart of a long vector. */
export function renderNumbers(modality, numbers, label) {
  const texts = numbers.map((number, i) => formatNumber(number, modality.std?.[i]));
  return modality.size > MAX_NUMBERS
    ? barChart(numbers, texts, label)
    : element("span", { class: "numbers", title: label }, texts.join(", "));
}

/** Formats a generated number as finely as its standard deviation suggests: 2012.35 for a year with 2.2. */
function formatNumber(number, std) {
  const decimals = DIGITS - 1 - Math.floor(Math.log10(std || 1));
  return String(Number(number.toFixed(Math.min(Math.max(decimals, 0), 100))));
}

/** Creates a bar chart of numbers around zero. `texts` are the formatted numbers. */
function barChart(numbers, texts, label) {
  const largest = Math.max(...numbers.map(Math.abs), Number.MIN_VALUE);
  const summary = texts.slice(0, MAX_NUMBERS_IN_LABEL).join(", ");
  const chart = element("div", { class: "bar-chart", role: "img", "aria-label": `${label} ${summary}` });
  numbers.forEach((number, i) => {
    const column = element("i", { title: texts[i] });
    column.style.height = `${(50 * Math.abs(number)) / largest}%`;
    column.style[number < 0 ? "top" : "bottom"] = "50%";
    chart.append(element("span", {}, column));
  });
  return chart;
}

/** Creates a list of names with probabilities. A long list shows the largest probabilities in descending order. */
function renderProbabilities(probabilities) {
  let entries = Object.entries(probabilities);
  const hidden = entries.length - MAX_ATTRIBUTES;
  if (hidden > 0) entries = entries.sort((a, b) => b[1] - a[1]).slice(0, MAX_ATTRIBUTES);
  const rows = entries.map(([name, p]) =>
    element("li", {}, element("span", {}, name), bar(p), element("span", { class: "number" }, p.toFixed(2))),
  );
  return element("ul", { class: "probabilities" }, ...rows, hidden > 0 ? element("li", {}, `and ${hidden} less likely`) : null);
}
