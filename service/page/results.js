// What was generated: a block for each subset of the evidence, in it every modality side by side.

import { element } from "./dom.js";
import { show } from "./values.js";

/** @param subsets names of the modalities that each item gave. @param data items of the answer, in the same order. */
export function results(place, modalities, subsets, data) {
  place.replaceChildren(...subsets.map((subset, i) => block(modalities, subset, data[i].generated, subsets.length > 1)));
}

function block(modalities, subset, generated, titled) {
  const figures = modalities
    .filter(({ name }) => name in generated)
    .map((modality) => figure(modality, generated[modality.name], subset));
  return element(
    "div",
    { class: "block" },
    titled ? element("h3", {}, "from ", element("b", {}, subset.join(" + ")), subset.length === 1 ? " alone" : "") : null,
    element("div", { class: "figures" }, ...figures),
  );
}

function figure(modality, values, subset) {
  const given = subset.includes(modality.name);
  const label = `${modality.name}, ${given ? "reconstructed" : "generated"} from ${subset.join(" and ")}`;
  return element(
    "figure",
    { class: given ? "given" : "", "data-modality": modality.name },
    element("figcaption", {}, modality.name, given ? element("span", {}, "reconstructed") : null),
    element(
      "div",
      { class: `samples-of ${modality.kind}`, "data-count": Math.min(values.length, 5) },
      ...values.map((value, i) => show(modality, value, values.length > 1 ? `${label}, sample ${i + 1}` : label)),
    ),
  );
}
