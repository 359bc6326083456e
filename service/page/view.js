// One model on the screen: its inputs, and everything that follows from them.

import { Refusal, post } from "./api.js";
import { Climb } from "./climb.js";
import { element, knob } from "./dom.js";
import { Evidence } from "./evidence.js";
import { examples } from "./examples.js";
import { facts } from "./facts.js";
import { latest } from "./latest.js";
import { LatentMap } from "./latent.js";
import { Program, timings } from "./program.js";
import { results } from "./results.js";

const MOST_STEPS = 16;
const MOST_SAMPLES = 8;
const FRAME_MS = 120;
const MOST_KEPT = 256;
const at = (id) => document.getElementById(id);

/** Until it is left for another. */
export class View {
  /**
   * @param model as GET /v1/models tells it; `several` are served.
   * @param shown rows of samples, and the map of the latent space.
   * @param refused is told of a refusal that is of no input's doing, and of any that may be over by now.
   */
  constructor(model, several, { samples, map }, refused) {
    this.refused = refused;
    this.model = model;
    this.several = several;
    this.names = model.modalities.map((modality) => modality.name);
    this.seen = new Map();
    this.run = latest(
      () => this.answer(),
      (busy) => at("results").setAttribute("aria-busy", busy),
    );
    const changed = () => {
      this.playing = false;
      return this.run();
    };
    const most = Math.max(1, Math.min(MOST_SAMPLES, Math.floor(model.limits.max_samples / this.names.length)));
    this.samples = knob("Samples", { id: "num_samples", min: 1, max: most, step: 1, value: Math.min(4, most) }, changed);
    this.temperature = knob(
      "Temperature",
      { id: "temperature", min: 0, max: 2, step: 0.05, value: 0.5, format: (n) => n.toFixed(2) },
      changed,
    );
    this.seed = knob("Seed", { id: "seed", type: "number", min: 0, max: 2 ** 31, step: 1, value: 0 }, changed);
    this.compare = element("input", { type: "checkbox", id: "compare", onchange: changed });
    at("knobs").replaceChildren(
      this.samples.whole,
      this.temperature.whole,
      this.seed.whole,
      element("label", { class: "check" }, this.compare, "also from each one alone"),
    );
    this.evidence = new Evidence(at("inputs"), model.modalities, samples, changed);
    document.onpaste = (event) => this.evidence.paste(event.clipboardData.files[0]);
    this.map = new LatentMap(at("map"), map);
    this.climb = new Climb(at("climb"), Math.min(MOST_STEPS, model.limits.max_refine_steps), changed, () =>
      this.play(this.climb.most),
    );
    this.program = new Program(at("code"));
    const starts = examples(model.modalities, samples);
    const buttons = starts.map((example) =>
      element("button", { type: "button", onclick: () => this.start(example) }, example.title),
    );
    at("examples").replaceChildren(element("span", {}, "Start from"), ...buttons);
    at("examples").hidden = !starts.length;
    at("page").hidden = false;
    if (starts.length) this.start(starts[0]);
    else this.run();
  }

  leave() {
    this.left = true;
    this.playing = false;
    clearTimeout(this.retry);
  }

  async start({ give, noise, compare, steps }) {
    await this.evidence.give(give, noise);
    this.compare.checked = compare;
    await this.play(steps);
  }

  /** Show every step in turn, up to this one, unless something else is asked for. */
  async play(steps) {
    const playing = (this.playing = {});
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    for (let step = still ? steps : 0; step <= steps && this.playing === playing; step++) {
      this.climb.steps = step;
      await Promise.all([this.run(), new Promise((done) => setTimeout(done, step < steps ? FRAME_MS : 0))]);
    }
  }

  /** The requests that are on the screen; null where nothing is given. */
  bodies() {
    const given = this.evidence.given();
    const names = Object.keys(given);
    if (!names.length) return null;
    const alone =
      names.length > 1 ? names.slice(0, this.model.limits.max_items - 1).map((name) => ({ [name]: given[name] })) : [];
    const shared = {
      ...(this.several && { model: `${this.model.id}@${this.model.version}` }),
      seed: Number(this.seed.input.value),
      refine: { steps: this.climb.steps, trace: true },
    };
    return {
      embed: { inputs: [given, ...alone], ...shared, representation: "mean_log_var" },
      "cross-generate": {
        inputs: this.compare.checked ? [given, ...alone] : [given],
        ...shared,
        targets: this.names,
        num_samples: Number(this.samples.input.value),
        temperature: Number(this.temperature.input.value),
      },
    };
  }

  async answer() {
    clearTimeout(this.retry);
    const bodies = this.bodies();
    this.forgive();
    if (!bodies) return this.empty();
    const evidence = JSON.stringify([bodies.embed.inputs, bodies.embed.seed]);
    if (evidence !== this.shown) {
      this.shown = evidence;
      this.seen.clear();
      this.climb.forget();
    }
    this.program.show(bodies);
    try {
      const [embedded, generated] = await Promise.all([
        this.once("embed", bodies.embed),
        this.once("cross-generate", bodies["cross-generate"]),
      ]);
      if (!this.left) this.show(bodies, embedded, generated);
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal;
      if (!this.left) this.refuse(refusal);
    }
    return undefined;
  }

  /** The same request has the same answer: moved back and forth, the slider asks once. */
  async once(call, body) {
    const key = call + JSON.stringify(body);
    if (this.seen.size > MOST_KEPT) this.seen.clear();
    const answer = this.seen.get(key) ?? (await post(call, body));
    this.seen.set(key, answer);
    return answer;
  }

  show(bodies, embedded, generated) {
    const posteriors = embedded.body.data.map((one) => ({ mean: one.embedding, log_var: one.log_var }));
    const subsets = embedded.body.data.map((one) => one.modalities);
    const { refinement } = embedded.body.data[0];
    this.map.show(subsets, posteriors, this.trail(bodies.embed));
    facts(at("facts"), subsets, posteriors);
    this.climb.show(
      refinement,
      this.names.filter((name) => !subsets[0].includes(name)),
    );
    results(
      at("results"),
      this.model.modalities,
      generated.body.data.map((one) => one.modalities),
      generated.body.data,
    );
    timings(at("timings"), generated);
    at("told").textContent = `Shown: ${this.names.join(", ")}, from ${subsets[0].join(", ")}.`;
  }

  /** Means of the same evidence at fewer steps, as far as they were asked for. */
  trail(body) {
    const means = [];
    for (let steps = 0; steps <= body.refine.steps; steps++) {
      const seen = this.seen.get("embed" + JSON.stringify({ ...body, refine: { ...body.refine, steps } }));
      if (seen) means.push(seen.body.data[0].embedding);
    }
    return means;
  }

  empty() {
    this.shown = undefined;
    this.climb.forget();
    this.map.show([], []);
    facts(at("facts"), [], []);
    this.program.show({});
    at("timings").replaceChildren();
    at("told").textContent = "";
    at("results").replaceChildren(
      element("p", { class: "hint" }, "Nothing is given yet: draw something, write something, or pick a sample."),
    );
  }

  /** Say what went wrong where it did; ask again when the service says that is worth it. */
  refuse(refusal) {
    const told = refusal.faults.filter(({ modality, option, detail }) =>
      modality ? this.evidence.blame(modality, detail) : this.blame(option, detail),
    );
    if (refusal.waitMs) this.retry = setTimeout(this.run, refusal.waitMs);
    if (!told.length || told.length < refusal.faults.length) this.refused(refusal);
  }

  blame(option, detail) {
    const fault = at(`${option === "refine" ? "steps" : option}-fault`);
    if (fault) Object.assign(fault, { textContent: detail, hidden: false });
    return Boolean(fault);
  }

  forgive() {
    at("notice").hidden = true;
    this.evidence.forgive();
    for (const fault of document.querySelectorAll(".knob .fault")) fault.hidden = true;
  }
}
