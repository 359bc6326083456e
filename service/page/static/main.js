// Entry point: loads the models, prompts for an API key if the service requires one, and shows whether the service is ready.

import { ApiError, get, readinessFailure, setApiKey } from "./api.js";
import { byId, element } from "./dom.js";
import { ModelView } from "./model-view.js";
import { plural } from "./text.js";

const READINESS_INTERVAL_MS = 15_000;
let view = null;
let modelSummary = "";

async function loadModels() {
  const models = (await get("v1/models")).body.data;
  byId("api-key-form").hidden = true;
  byId("model").replaceChildren(...models.map((model) => element("option", {}, fullName(model))));
  byId("model-picker").hidden = models.length < 2;
  const showSelected = () => showModel(models[byId("model").selectedIndex], models.length > 1);
  byId("model").onchange = () => runWithRetry(showSelected);
  await showSelected();
}

async function showModel(model, sendModel) {
  const demoData = (await get(`page/samples/${encodeURIComponent(fullName(model))}`)).body;
  const modalities = plural(model.modalities.length, "modality", "modalities");
  modelSummary = `${fullName(model)} · ${modalities} · ${plural(model.latent, "dimension")}`;
  view?.dispose();
  view = new ModelView(model, sendModel, demoData, showError);
  await updateStatus();
}

/** Runs the task, and runs it again if it fails and the service says when to retry. */
async function runWithRetry(task) {
  byId("notice").hidden = true;
  try {
    await task();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showError(error);
    if (error.retryAfterMs) setTimeout(() => runWithRetry(task), error.retryAfterMs);
  }
}

function showError({ status, problem, retryAfterMs }) {
  const retry = retryAfterMs ? ` Retrying in ${Math.ceil(retryAfterMs / 1000)} s.` : "";
  byId("notice").textContent = `${problem.title ?? "Error"}: ${problem.detail}.${retry}`;
  byId("notice").hidden = status === 401; // the form for the key is enough
  byId("api-key-form").hidden = status !== 401 && status !== 403;
  updateStatus();
}

async function updateStatus() {
  const failure = await readinessFailure();
  byId("status").classList.toggle("not-ready", Boolean(failure));
  byId("status").textContent = failure || modelSummary;
}

function fullName({ id, version }) {
  return `${id}@${version}`;
}

byId("api-key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setApiKey(byId("api-key").value);
  runWithRetry(loadModels);
});
setInterval(() => document.visibilityState === "visible" && updateStatus(), READINESS_INTERVAL_MS);
runWithRetry(loadModels);
