// The "Refinement" section: a slider for the number of steps, and a chart of the objective at each step.

import { element, numberControl, svgElement } from "./dom.js";
import { plural } from "./text.js";

const [WIDTH, HEIGHT] = [340, 96];
const EDGE = 9; // half the width of the slider's thumb, so that each point is above its slider position

const NO_STEPS = "Without steps, this is the encoder’s posterior. Each step follows the gradient of the objective.";

/**
 * What refinement did, as in the response of POST /embed. The objective is in weighted nats.
 *
 * @typedef {object} Refinement
 * @property {"elbo" | "observed"} objective "elbo" if all modalities are inputs
 * @property {number} steps
 * @property {number} before objective of the encoder's posterior
 * @property {number} after objective of the refined posterior
 * @property {"steps" | "tolerance" | "budget" | "diverged"} stopped
 * @property {number[]} trace (steps + 1), the objective before the first and after each step
 */

export class RefinementPanel {
  /**
   * @param {HTMLElement} container
   * @param {number} maxSteps
   * @param {number | null} recommended steps of the slider at the start; null without a recommendation
   * @param {(steps: number) => void} onChange runs when the user moves the slider
   * @param {() => void} onPlay runs when the user wants to see all steps in turn
   */
  constructor(container, maxSteps, recommended, onChange, onPlay) {
    this.maxSteps = maxSteps;
    this.startSteps = Math.min(recommended ?? 0, maxSteps);
    this.trace = [];
    const range = { id: "steps", min: 0, max: maxSteps, step: 1, value: this.startSteps };
    this.control = numberControl("Steps", range, (steps) => {
      this.renderChart();
      onChange(steps);
    });
    this.chart = svgElement("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "objective-chart", role: "img" });
    this.summary = element("p", { class: "hint", id: "objective" });
    const playButton = element("button", { type: "button", class: "link-button", onclick: onPlay }, "Play");
    const hint = recommended === null ? "" : `Recommended for this model: ${plural(this.startSteps, "step")}.`;
    const recommendation = element("p", { class: "hint", id: "recommended-steps", hidden: !hint }, hint);
    container.replaceChildren(this.chart, this.control.root, playButton, recommendation, this.summary);
    this.reset();
  }

  get steps() {
    return Number(this.control.input.value);
  }

  set steps(steps) {
    this.control.set(Math.min(steps, this.maxSteps));
    this.renderChart();
  }

  /** Discards the chart: the inputs changed. */
  reset() {
    this.trace = [];
    this.summary.textContent = NO_STEPS;
    this.renderChart();
  }

  /**
   * @param {Refinement | null} refinement null without steps
   * @param {string[]} missing the modalities that are not inputs
   */
  show(refinement, missing) {
    if (!refinement) {
      this.summary.textContent = NO_STEPS;
      return this.renderChart();
    }
    // A longer trace of the same inputs stays while the user moves the slider back.
    if (refinement.trace.length > this.trace.length) this.trace = refinement.trace;
    const { objective, before, after, stopped, steps } = refinement;
    const name =
      objective === "elbo" ? "the full multimodal ELBO" : `the observed terms of the ELBO (without ${missing.join(", ")})`;
    this.summary.replaceChildren(
      "Objective: ",
      element("b", {}, name),
      `, ${formatNats(before)} → ${formatNats(after)}, `,
      element("b", {}, `+${(after - before).toFixed(1)} nats`),
      stopped === "steps" ? "" : `, stopped after ${plural(steps, "step")}: ${stopped}`,
      ".",
    );
    return this.renderChart();
  }

  renderChart() {
    const { trace, steps, maxSteps } = this;
    const [lowest, highest] = [Math.min(...trace), Math.max(...trace)];
    const x = (step) => EDGE + ((WIDTH - 2 * EDGE) * step) / Math.max(maxSteps, 1);
    const y = (value) => HEIGHT - 8 - ((HEIGHT - 24) * (value - lowest)) / (highest - lowest || 1);
    const current = Math.min(steps, trace.length - 1);
    const ticks = Array.from({ length: maxSteps + 1 }, (_, step) =>
      svgElement("line", { x1: x(step), x2: x(step), y1: HEIGHT - 5, y2: HEIGHT, class: "tick" }),
    );
    const line = svgElement("polyline", {
      points: trace.map((value, step) => `${x(step)},${y(value)}`).join(" "),
      class: "line",
    });
    const points = trace.map((value, step) =>
      svgElement("circle", {
        cx: x(step),
        cy: y(value),
        r: step === current ? 4.5 : 2,
        class: step === current ? "current-point" : "point",
      }),
    );
    this.chart.replaceChildren(...ticks, ...(trace.length ? [line, ...points] : []));
    this.chart.setAttribute(
      "aria-label",
      trace.length ? `Objective at each step: ${trace.map(formatNats).join(", ")} nats` : "Objective at each step: none yet",
    );
  }
}

const formatNats = (value) => value.toFixed(1).replace("-", "−");
