// What to start from, read off the manifest: a text to pictures, a noisy picture with and without its text, a picture refined.

import { drawable } from "./picture.js";

/** [{title, give, noise, compare, steps}] for a bundle's modalities and its rows of samples. */
export function examples(modalities, samples) {
  const named = (row, ...names) => Object.fromEntries(names.map((name) => [name, row[name]]));
  const images = modalities.filter((m) => m.kind === "image" && drawable(m));
  const text = modalities.find((m) => m.kind === "text" || m.kind === "categorical");
  const row = samples.find((one) => !text || one[text.name]);
  if (!row) return [];
  const vivid = images.toSorted((a, b) => b.channels - a.channels)[0];
  const plain = images.toSorted((a, b) => a.channels - b.channels)[0];
  const found = [];
  if (text && vivid) {
    found.push({
      title: `a ${text.name}, to ${list(images.map((m) => m.name))}`,
      give: named(row, text.name),
      compare: false,
      steps: 0,
    });
    found.push({
      title: `a noisy ${vivid.name}, with and without its ${text.name}`,
      give: named(row, vivid.name, text.name),
      noise: { [vivid.name]: 0.35 },
      compare: true,
      steps: 0,
    });
  }
  if (plain)
    found.push({ title: `a ${plain.name}, refined`, give: named(samples[1] ?? row, plain.name), compare: false, steps: 8 });
  if (!found.length)
    found.push({ title: `${modalities[0].name} alone`, give: named(row, modalities[0].name), compare: false, steps: 0 });
  return found;
}

function list(names) {
  return names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}
