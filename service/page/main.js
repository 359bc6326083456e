// The page: asks what is served, with a key where one is needed, and shows it; tells how the service is.

import { Refusal, get, unreadiness, useKey } from "./api.js";
import { element } from "./dom.js";
import { View } from "./view.js";

const READY_MS = 15_000;
const at = (id) => document.getElementById(id);
let view = null;

async function begin() {
  const models = (await get("v1/models")).body.data;
  at("access").hidden = true;
  at("model").replaceChildren(...models.map((model) => element("option", {}, named(model))));
  at("choose").hidden = models.length < 2;
  const show = () => serve(models[at("model").selectedIndex], models.length > 1);
  at("model").onchange = () => attempt(show);
  await show();
}

async function serve(model, several) {
  const shown = (await get(`page/samples/${encodeURIComponent(named(model))}`)).body;
  at("state").dataset.ready = `${named(model)} · ${model.modalities.length} modalities · ${model.latent} dimensions`;
  view?.leave();
  view = new View(model, several, shown, refused);
  await readiness();
}

/** Do this now, and again when the service says that it is worth it. */
async function attempt(what) {
  at("notice").hidden = true;
  try {
    await what();
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    refused(refusal);
    if (refusal.waitMs) setTimeout(() => attempt(what), refusal.waitMs);
  }
}

function refused({ status, problem, waitMs }) {
  const again = waitMs ? ` Asking again in ${Math.ceil(waitMs / 1000)} s.` : "";
  at("notice").textContent = `${problem.title ?? "Refused"}: ${problem.detail}.${again}`;
  at("notice").hidden = status === 401; // the field for the key says it all
  at("access").hidden = status !== 401 && status !== 403;
  readiness();
}

async function readiness() {
  const lack = await unreadiness();
  at("state").classList.toggle("ailing", Boolean(lack));
  at("state").textContent = lack || at("state").dataset.ready || "";
}

function named({ id, version }) {
  return `${id}@${version}`;
}

at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value);
  attempt(begin);
});
setInterval(() => document.visibilityState === "visible" && readiness(), READY_MS);
attempt(begin);
