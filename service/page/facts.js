// How much each part of the evidence says, in numbers.

import { bar, element } from "./dom.js";

/** @param subsets names that each posterior is of; the one of everything given comes first, and is shown last. */
export function facts(place, subsets, posteriors) {
  const told = posteriors.map((posterior, i) => [subsets[i].join(" + "), information(posterior), spread(posterior)]);
  const rows = [["nothing: the prior", 0, 1], ...told.reverse()];
  const most = Math.max(...rows.map(([, nats]) => nats), 1e-9);
  const titles = ["given", "nats from the prior", "std"].map((title) => element("th", { scope: "col" }, title));
  const lines = rows.map(([name, nats, std]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, name),
      element("td", {}, bar(nats / most), element("span", { class: "number" }, nats.toFixed(1))),
      element("td", { class: "number" }, std.toFixed(2)),
    ),
  );
  place.replaceChildren(
    element("table", {}, element("thead", {}, element("tr", {}, ...titles)), element("tbody", {}, ...lines)),
  );
}

/** KL(posterior ‖ prior) in nats: what the evidence tells. */
function information({ mean, log_var }) {
  return mean.reduce((sum, m, i) => sum + 0.5 * (m * m + Math.exp(log_var[i]) - 1 - log_var[i]), 0);
}

/** Geometric mean of the standard deviations; the prior's is 1. */
function spread({ log_var }) {
  return Math.exp(log_var.reduce((sum, l) => sum + l / 2, 0) / log_var.length);
}
