// The page: asks what is served, lays out its inputs, and keeps what is shown in step with them.

import { Refusal, get, post, unreadiness, useKey } from "./api.js";
import { Climb } from "./climb.js";
import { bar, element, knob } from "./dom.js";
import { Evidence } from "./evidence.js";
import { examples } from "./examples.js";
import { LatentMap, information, spread } from "./latent.js";
import { Program, timings } from "./program.js";
import { results } from "./results.js";

const MOST_STEPS = 16;
const MOST_SAMPLES = 8;
const READY_MS = 15_000;
const FRAME_MS = 120;
const MOST_KEPT = 256;
let page = null;
const at = (id) => document.getElementById(id);

/** One run at a time; asked while it runs, it runs once more after. `busy` is told when it begins and ends. */
function latest(run, busy) {
  let running = null;
  let asked = false;
  const all = async () => {
    busy(true);
    while (asked) {
      asked = false;
      await run();
    }
    running = null;
    busy(false);
  };
  return () => {
    asked = true;
    return (running ??= all());
  };
}

/** What is shown of one model, until it is left for another. */
class Page {
  constructor(model, several, { samples, map }) {
    this.model = model;
    this.several = several;
    this.names = model.modalities.map((modality) => modality.name);
    this.seen = new Map();
    this.run = latest(() => this.answer(), (busy) => at("results").setAttribute("aria-busy", busy));
    const changed = () => {
      this.playing = false;
      return this.run();
    };
    const most = Math.max(1, Math.min(MOST_SAMPLES, Math.floor(model.limits.max_samples / this.names.length)));
    this.samples = knob("Samples", { id: "num_samples", min: 1, max: most, step: 1, value: Math.min(4, most) }, changed);
    this.temperature = knob("Temperature", { id: "temperature", min: 0, max: 2, step: 0.05, value: 0.5, format: (n) => n.toFixed(2) }, changed);
    this.seed = knob("Seed", { id: "seed", type: "number", min: 0, max: 2 ** 31, step: 1, value: 0 }, changed);
    this.compare = element("input", { type: "checkbox", id: "compare", onchange: changed });
    at("knobs").replaceChildren(this.samples.whole, this.temperature.whole, this.seed.whole,
      element("label", { class: "check" }, this.compare, "also from each one alone"));
    this.evidence = new Evidence(at("inputs"), model.modalities, samples, changed);
    document.onpaste = (event) => this.evidence.paste(event.clipboardData.files[0]);
    this.map = new LatentMap(at("map"), map);
    this.climb = new Climb(at("climb"), Math.min(MOST_STEPS, model.limits.max_refine_steps), changed, () => this.play(this.climb.most));
    this.program = new Program(at("code"));
    const starts = examples(model.modalities, samples);
    const buttons = starts.map((example) => element("button", { type: "button", onclick: () => this.start(example) }, example.title));
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
    const alone = names.length > 1 ? names.slice(0, this.model.limits.max_items - 1).map((name) => ({ [name]: given[name] })) : [];
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
      const [embedded, generated] = await Promise.all([this.once("embed", bodies.embed), this.once("cross-generate", bodies["cross-generate"])]);
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
    this.facts(subsets, posteriors);
    this.climb.show(refinement, this.names.filter((name) => !subsets[0].includes(name)));
    results(at("results"), this.model.modalities, generated.body.data.map((one) => one.modalities), generated.body.data);
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

  facts(subsets, posteriors) {
    const rows = [["nothing: the prior", 0, 1], ...posteriors.map((one, i) => [subsets[i].join(" + "), information(one), spread(one)]).reverse()];
    const most = Math.max(...rows.map(([, nats]) => nats), 1e-9);
    at("facts").replaceChildren(element("table", {},
      element("thead", {}, element("tr", {}, ...["given", "nats from the prior", "std"].map((title) => element("th", { scope: "col" }, title)))),
      element("tbody", {}, ...rows.map(([name, nats, std]) =>
        element("tr", {}, element("th", { scope: "row" }, name),
          element("td", {}, bar(nats / most), element("span", { class: "number" }, nats.toFixed(1))),
          element("td", { class: "number" }, std.toFixed(2)))))));
  }

  empty() {
    this.shown = undefined;
    this.climb.forget();
    this.map.show([], []);
    this.facts([], []);
    this.program.show({});
    at("timings").replaceChildren();
    at("told").textContent = "";
    at("results").replaceChildren(element("p", { class: "hint" }, "Nothing is given yet: draw something, write something, or pick a sample."));
  }

  /** Say what went wrong where it did; ask again when the service says that is worth it. */
  refuse(refusal) {
    const elsewhere = refusal.faults.filter(([name, detail]) => !this.blame(name, detail));
    if (elsewhere.length || !refusal.faults.length) notify(refusal);
    at("access").hidden = refusal.status !== 401 && refusal.status !== 403;
    if (refusal.waitMs) this.retry = setTimeout(this.run, refusal.waitMs);
    readiness();
  }

  blame(name, detail) {
    const fault = at(`${name === "refine" ? "steps" : name}-fault`);
    if (!fault) return this.evidence.blame(name, detail);
    fault.textContent = detail;
    fault.hidden = false;
    return true;
  }

  forgive() {
    at("notice").hidden = true;
    this.evidence.forgive();
    for (const fault of document.querySelectorAll(".knob .fault")) fault.hidden = true;
  }
}

function notify({ problem, waitMs }) {
  const again = waitMs ? ` Asking again in ${Math.ceil(waitMs / 1000)} s.` : "";
  at("notice").textContent = `${problem.title ?? "Refused"}: ${problem.detail}.${again}`;
  at("notice").hidden = false;
}

async function readiness() {
  const lack = await unreadiness();
  at("state").classList.toggle("ailing", Boolean(lack));
  at("state").textContent = lack || at("state").dataset.ready || "";
}

async function serve(model, several) {
  const id = `${model.id}@${model.version}`;
  at("state").dataset.ready = `${id} · ${model.modalities.length} modalities · ${model.latent} dimensions`;
  const shown = (await get(`page/samples/${encodeURIComponent(id)}`)).body;
  page?.leave();
  page = new Page(model, several, shown);
  await readiness();
}

async function begin() {
  at("notice").hidden = true;
  try {
    const models = (await get("v1/models")).body.data;
    at("access").hidden = true;
    at("model").replaceChildren(...models.map((model) => element("option", {}, `${model.id}@${model.version}`)));
    at("choose").hidden = models.length < 2;
    const show = () => serve(models[at("model").selectedIndex], models.length > 1).catch(notify);
    at("model").onchange = show;
    await show();
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    const locked = refusal.status === 401 || refusal.status === 403;
    at("access").hidden = !locked;
    at("state").textContent = locked ? "An API key is needed." : "";
    if (refusal.status !== 401) notify(refusal);
    if (refusal.waitMs) setTimeout(begin, refusal.waitMs);
  }
}

at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value);
  begin();
});
setInterval(() => document.visibilityState === "visible" && at("state").dataset.ready && readiness(), READY_MS);
begin();
