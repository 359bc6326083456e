// Refinement: a slider of steps, and the objective at each of them right above it.

import { drawn, element, knob } from "./dom.js";

const [WIDTH, HEIGHT, EDGE] = [340, 96, 9]; // the edge is half a slider's thumb, so that steps stand above their place

const ENCODER = "The encoder alone, in one pass. Each step follows the gradient of the objective.";

export class Climb {
  /** `changed` when the user moved the slider; `play` when all steps are to be seen in turn. */
  constructor(place, most, changed, play) {
    this.most = most;
    this.trace = [];
    this.knob = knob("Steps", { id: "steps", min: 0, max: most, step: 1, value: 0 }, (steps) => {
      this.draw();
      changed(steps);
    });
    this.chart = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img" });
    this.words = element("p", { class: "hint", id: "objective" });
    const button = element("button", { type: "button", class: "quiet", onclick: play }, "Play");
    place.replaceChildren(this.chart, this.knob.whole, button, this.words);
    this.forget();
  }

  get steps() {
    return Number(this.knob.input.value);
  }

  set steps(number) {
    this.knob.set(Math.min(number, this.most));
    this.draw();
  }

  /** Other evidence: what was seen is no longer so. */
  forget() {
    this.trace = [];
    this.words.textContent = ENCODER;
    this.draw();
  }

  /** @param refinement of the answer, or null. @param absent modalities that were not given. */
  show(refinement, absent) {
    if (!refinement) {
      this.words.textContent = ENCODER;
      return this.draw();
    }
    if (refinement.trace.length > this.trace.length) this.trace = refinement.trace;
    const { objective, before, after, stopped, steps } = refinement;
    const climbed = objective === "elbo" ? "the full multimodal ELBO" : `the observed terms alone (no ${absent.join(", ")})`;
    const end = stopped === "steps" ? "" : `, stopped after ${steps}: ${stopped}`;
    this.words.replaceChildren(
      "Climbed ",
      element("b", {}, climbed),
      `: ${nats(before)} → ${nats(after)}, `,
      element("b", {}, `+${(after - before).toFixed(1)} nats`),
      end,
      ".",
    );
    return this.draw();
  }

  draw() {
    const { trace, steps, most } = this;
    const [low, high] = [Math.min(...trace), Math.max(...trace)];
    const x = (step) => EDGE + ((WIDTH - 2 * EDGE) * step) / Math.max(most, 1);
    const y = (value) => HEIGHT - 8 - ((HEIGHT - 24) * (value - low)) / (high - low || 1);
    const at = Math.min(steps, trace.length - 1);
    this.chart.replaceChildren(
      ...Array.from({ length: most + 1 }, (_, step) =>
        drawn("line", { x1: x(step), x2: x(step), y1: HEIGHT - 5, y2: HEIGHT, class: "axis" }),
      ),
      ...(trace.length
        ? [
            drawn("polyline", { points: trace.map((value, step) => `${x(step)},${y(value)}`).join(" "), class: "trace" }),
            ...trace.map((value, step) =>
              drawn("circle", { cx: x(step), cy: y(value), r: step === at ? 4.5 : 2, class: step === at ? "now" : "step" }),
            ),
          ]
        : []),
    );
    this.chart.setAttribute(
      "aria-label",
      trace.length ? `Objective by step: ${trace.map(nats).join(", ")} nats` : "Objective by step: none yet",
    );
  }
}

const nats = (value) => value.toFixed(1).replace("-", "−");
