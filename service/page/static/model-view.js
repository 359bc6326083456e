// Connects the sections of the page for one model: reads the inputs, sends the requests, and shows the responses.

import { ApiError, post } from "./api.js";
import { coalesce } from "./coalesce.js";
import { byId, element, numberControl } from "./dom.js";
import { makeExamples } from "./examples.js";
import { renderGenerated } from "./generated.js";
import { InputsPanel } from "./inputs.js";
import { LatentMap } from "./latent-map.js";
import { renderPosteriorTable } from "./posterior-table.js";
import { RefinementPanel } from "./refinement.js";
import { CodeSnippets } from "./snippets.js";
import { renderTimings } from "./timings.js";

const MAX_STEPS = 16;
const MAX_SAMPLES = 8;
const NEAREST = 4; // training examples, if the model has a gallery
const FRAME_MS = 120;
const MAX_CACHED_RESPONSES = 256;

/** Call `dispose` before another model is shown. */
export class ModelView {
  /**
   * @param {import("./api.js").Model} model
   * @param {boolean} sendModel whether requests must name the model, because the service has more than one
   * @param {{samples: import("./api.js").Inputs[], map: import("./latent-map.js").MapData}} demoData the response of
   *   GET /page/samples/{model}
   * @param {(error: ApiError) => void} onError runs for an error that belongs to no single control
   */
  constructor(model, sendModel, { samples: rows, map }, onError) {
    this.model = model;
    this.sendModel = sendModel;
    this.onError = onError;
    this.names = model.modalities.map((modality) => modality.name);
    this.hasGallery = model.modalities.some(({ gallery }) => gallery);
    this.hasSound = model.modalities.some(({ kind }) => kind === "audio");
    this.responses = new Map();
    this.update = coalesce(
      () => this.requestAndShow(),
      (busy) => byId("generated").setAttribute("aria-busy", busy),
    );
    const onChange = () => {
      this.playback = null;
      return this.update();
    };
    this.addSamplingControls(onChange);
    this.inputs = new InputsPanel(byId("inputs"), model.modalities, rows, onChange);
    document.onpaste = (event) => this.inputs.paste(event.clipboardData.files[0]);
    this.map = new LatentMap(byId("latent-map"), map);
    const maxSteps = Math.min(MAX_STEPS, model.limits.max_refine_steps);
    const onPlay = () => this.playSteps(maxSteps);
    this.refinement = new RefinementPanel(byId("refinement"), maxSteps, model.recommended_refine_steps, onChange, onPlay);
    this.snippets = new CodeSnippets(byId("snippets"));
    const examples = makeExamples(model.modalities, rows);
    this.addExampleButtons(examples);
    byId("content").hidden = false;
    if (examples.length) this.showExample(examples[0]);
    else this.update();
  }

  addSamplingControls(onChange) {
    const limit = Math.floor(this.model.limits.max_samples / this.names.length);
    const maxSamples = Math.max(1, Math.min(MAX_SAMPLES, limit));
    this.samples = numberControl(
      "Samples",
      { id: "num_samples", min: 1, max: maxSamples, step: 1, value: Math.min(4, maxSamples) },
      onChange,
    );
    this.temperature = numberControl(
      "Temperature",
      { id: "temperature", min: 0, max: 2, step: 0.05, value: 0.5, format: (temperature) => temperature.toFixed(2) },
      onChange,
    );
    this.seed = numberControl("Seed", { id: "seed", type: "number", min: 0, max: 2 ** 31, step: 1, value: 0 }, onChange);
    this.compare = element("input", { type: "checkbox", id: "compare", onchange: onChange });
    byId("sampling-controls").replaceChildren(
      this.samples.root,
      this.temperature.root,
      this.seed.root,
      element("label", { class: "checkbox-label" }, this.compare, "also from each input alone"),
    );
  }

  addExampleButtons(examples) {
    const buttons = examples.map((example) =>
      element("button", { type: "button", onclick: () => this.showExample(example) }, example.title),
    );
    byId("examples").replaceChildren(element("span", {}, "Examples"), ...buttons);
    byId("examples").hidden = !examples.length;
  }

  /** Stops playback and retries. Responses that arrive later are ignored. */
  dispose() {
    this.disposed = true;
    this.playback = null;
    clearTimeout(this.retryTimer);
  }

  /** @param {import("./examples.js").Example} example */
  async showExample({ inputs, noise, compare, steps }) {
    await this.inputs.setValues(inputs, noise);
    this.compare.checked = compare;
    const { startSteps } = this.refinement;
    await (steps === undefined ? this.playSteps(startSteps, startSteps) : this.playSteps(steps));
  }

  /** Shows the refinement steps from `first` to `steps` in turn, until the user changes something. */
  async playSteps(steps, first = 0) {
    const playback = (this.playback = {});
    const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
    for (let step = reducedMotion ? steps : first; step <= steps && this.playback === playback; step++) {
      this.refinement.steps = step;
      await Promise.all([this.update(), new Promise((resolve) => setTimeout(resolve, step < steps ? FRAME_MS : 0))]);
    }
  }

  /**
   * The requests for the current state of the page: the first item has all inputs, the next have one input each.
   *
   * @returns {{embed: object, "cross-generate": object} | null} the JSON body for each endpoint; null without inputs
   */
  requestBodies() {
    const inputs = this.inputs.values();
    const names = Object.keys(inputs);
    if (!names.length) return null;
    const unimodal =
      names.length > 1 ? names.slice(0, this.model.limits.max_items - 1).map((name) => ({ [name]: inputs[name] })) : [];
    const options = {
      ...(this.sendModel && { model: `${this.model.id}@${this.model.version}` }),
      seed: Number(this.seed.input.value),
      refine: { steps: this.refinement.steps, trace: true },
    };
    return {
      embed: { inputs: [inputs, ...unimodal], ...options, representation: "mean_log_var" },
      "cross-generate": {
        inputs: this.compare.checked ? [inputs, ...unimodal] : [inputs],
        ...options,
        targets: this.names,
        num_samples: Number(this.samples.input.value),
        temperature: Number(this.temperature.input.value),
        ...(this.hasGallery && { nearest: NEAREST }),
        ...(this.hasSound && { output: { spectrogram: true } }),
      },
    };
  }

  async requestAndShow() {
    clearTimeout(this.retryTimer);
    const bodies = this.requestBodies();
    this.clearErrors();
    if (!bodies) return this.showEmpty();
    const refinedInputs = JSON.stringify([bodies.embed.inputs, bodies.embed.seed]);
    if (refinedInputs !== this.refinedInputs) {
      this.refinedInputs = refinedInputs;
      this.responses.clear();
      this.refinement.reset();
    }
    this.snippets.show(bodies);
    try {
      const [embedded, generated] = await Promise.all([
        this.cachedPost("embed", bodies.embed),
        this.cachedPost("cross-generate", bodies["cross-generate"]),
      ]);
      if (!this.disposed) this.show(bodies, embedded, generated);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (!this.disposed) this.showError(error);
    }
    return undefined;
  }

  /** The service is deterministic for a seed, so that the cache saves requests while the slider moves back and forth. */
  async cachedPost(endpoint, body) {
    const key = cacheKey(endpoint, body);
    if (this.responses.size > MAX_CACHED_RESPONSES) this.responses.clear();
    const response = this.responses.get(key) ?? (await post(endpoint, body));
    this.responses.set(key, response);
    return response;
  }

  show(bodies, embedded, generated) {
    const items = embedded.body.data;
    const posteriors = items.map(({ embedding, log_var }) => ({ mean: embedding, log_var }));
    const subsets = items.map(({ modalities }) => modalities);
    const missing = this.names.filter((name) => !subsets[0].includes(name));
    this.map.show(subsets, posteriors, this.refinementPath(bodies.embed));
    renderPosteriorTable(byId("posterior-table"), subsets, posteriors);
    this.refinement.show(items[0].refinement, missing);
    renderGenerated(byId("generated"), this.model.modalities, generated.body.data);
    renderTimings(byId("timings"), generated);
    byId("announcement").textContent = `Generated ${this.names.join(", ")} from ${subsets[0].join(", ")}.`;
  }

  /** Returns the posterior means (step, latent) of the same inputs after fewer steps, as far as they are in the cache. */
  refinementPath(body) {
    const means = [];
    for (let steps = 0; steps <= body.refine.steps; steps++) {
      const response = this.responses.get(cacheKey("embed", { ...body, refine: { ...body.refine, steps } }));
      if (response) means.push(response.body.data[0].embedding);
    }
    return means;
  }

  showEmpty() {
    this.refinedInputs = undefined;
    this.refinement.reset();
    this.map.show([], []);
    renderPosteriorTable(byId("posterior-table"), [], []);
    this.snippets.show({});
    byId("timings").replaceChildren();
    byId("announcement").textContent = "";
    byId("generated").replaceChildren(element("p", { class: "hint" }, "No inputs yet: draw, type, or pick an example."));
  }

  /** Shows each field error at its control and any other error by `onError`. Retries if the service says when. */
  showError(error) {
    const shown = error.fieldErrors.filter(({ modality, option, detail }) =>
      modality ? this.inputs.showError(modality, detail) : this.showOptionError(option, detail),
    );
    if (error.retryAfterMs) this.retryTimer = setTimeout(this.update, error.retryAfterMs);
    if (!shown.length || shown.length < error.fieldErrors.length) this.onError(error);
  }

  /** Returns whether there is a control for the option. */
  showOptionError(option, detail) {
    const message = byId(`${option === "refine" ? "steps" : option}-error`);
    if (message) Object.assign(message, { textContent: detail, hidden: false });
    return Boolean(message);
  }

  clearErrors() {
    byId("notice").hidden = true;
    this.inputs.clearErrors();
    for (const message of document.querySelectorAll(".number-control .field-error")) message.hidden = true;
  }
}

const cacheKey = (endpoint, body) => endpoint + JSON.stringify(body);
