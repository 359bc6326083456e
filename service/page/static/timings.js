// Shows the time that each stage of a request took.

import { element } from "./dom.js";

const NETWORK = "network and browser";

/**
 * @param {HTMLElement} container
 * @param {{ms: number, stages: Object<string, number>}} response the duration of the request and of its stages in the service,
 *   in milliseconds
 */
export function renderTimings(container, { stages, ms }) {
  const inService = Object.values(stages).reduce((sum, stageMs) => sum + stageMs, 0);
  const parts = [...Object.entries(stages), [NETWORK, Math.max(ms - inService, 0)]];
  const bar = element("div", { class: "timing-bar", "aria-hidden": "true" });
  for (const [name, partMs] of parts) {
    const segment = element("i", { class: name === NETWORK ? "network" : name });
    segment.style.flexGrow = partMs;
    bar.append(segment);
  }
  const items = parts.map(([name, partMs]) =>
    element("li", {}, name, " ", element("b", {}, `${partMs.toFixed(partMs < 10 ? 1 : 0)} ms`)),
  );
  container.replaceChildren(bar, element("ul", { class: "timing-list" }, ...items));
}
