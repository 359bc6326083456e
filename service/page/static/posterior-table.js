// A table with the prior and each posterior: information in nats, and mean standard deviation.

import { bar, element } from "./dom.js";

/**
 * @param {HTMLElement} container
 * @param {string[][]} subsets the input modalities of each posterior; the first has all inputs and becomes the last row
 * @param {import("./api.js").Posterior[]} posteriors in the same order
 */
export function renderPosteriorTable(container, subsets, posteriors) {
  const posteriorRows = posteriors.map((posterior, i) => [subsets[i].join(" + "), klToPrior(posterior), meanStd(posterior)]);
  const rows = [["none (the prior)", 0, 1], ...posteriorRows.reverse()];
  const largest = Math.max(...rows.map(([, nats]) => nats), 1e-9);
  const headings = ["inputs", "KL to prior (nats)", "std"].map((title) => element("th", { scope: "col" }, title));
  const bodyRows = rows.map(([name, nats, std]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, name),
      element("td", {}, bar(nats / largest), element("span", { class: "number" }, nats.toFixed(1))),
      element("td", { class: "number" }, std.toFixed(2)),
    ),
  );
  container.replaceChildren(
    element("table", {}, element("thead", {}, element("tr", {}, ...headings)), element("tbody", {}, ...bodyRows)),
  );
}

/** Returns KL(posterior ‖ prior) in nats, where the prior is standard normal. */
function klToPrior({ mean, log_var }) {
  return mean.reduce((sum, m, i) => sum + 0.5 * (m * m + Math.exp(log_var[i]) - 1 - log_var[i]), 0);
}

/** Returns the geometric mean of the standard deviations. It is 1 for the prior. */
function meanStd({ log_var }) {
  return Math.exp(log_var.reduce((sum, l) => sum + l / 2, 0) / log_var.length);
}
