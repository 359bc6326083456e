// The "Generated" section: one result for each subset of the inputs, with one figure for each modality.

import { element } from "./dom.js";
import { joinNames } from "./text.js";
import { renderExample, renderValue } from "./values.js";

/**
 * @param {HTMLElement} container
 * @param {import("./api.js").Modality[]} modalities
 * @param {{modalities: string[], generated: Object<string, object[]>, nearest?: Object<string, object[]>}[]} items `data` in the
 *   response of POST /cross-generate; `modalities` are those of the inputs
 */
export function renderGenerated(container, modalities, items) {
  container.replaceChildren(...items.map((item) => renderItem(modalities, item, items.length > 1)));
}

function renderItem(modalities, { modalities: inputs, generated, nearest = {} }, showTitle) {
  const figures = modalities
    .filter(({ name }) => name in generated)
    .map((modality) => renderFigure(modality, generated[modality.name], nearest[modality.name], inputs));
  const title = showTitle
    ? element("h3", {}, "from ", element("b", {}, inputs.join(" + ")), inputs.length === 1 ? " alone" : "")
    : null;
  return element("div", { class: "result" }, title, element("div", { class: "figures" }, ...figures));
}

function renderFigure(modality, samples, examples, inputs) {
  const reconstructed = inputs.includes(modality.name);
  const label = `${modality.name}, ${reconstructed ? "reconstructed" : "generated"} from ${joinNames(inputs)}`;
  return element(
    "figure",
    { "data-modality": modality.name },
    element("figcaption", {}, modality.name, reconstructed ? element("span", {}, "reconstructed") : null),
    element(
      "div",
      { class: `sample-grid ${modality.encoder ? "vector" : modality.kind}`, "data-count": Math.min(samples.length, 5) },
      ...samples.map((value, i) => renderValue(modality, value, samples.length > 1 ? `${label}, sample ${i + 1}` : label)),
    ),
    examples?.length
      ? element(
          "div",
          { class: "nearest" },
          element("p", { class: "hint" }, "nearest training examples"),
          element("ul", {}, ...examples.map((example) => element("li", {}, ...renderExample(example)))),
        )
      : null,
  );
}
