// The buttons at the top of the page: examples that suit the modalities of the model.

import { isDrawable } from "./images.js";
import { joinNames } from "./text.js";

const NOISE = 0.35;
const REFINEMENT_STEPS = 8;

/**
 * A state of the page.
 *
 * @typedef {object} Example
 * @property {string} title
 * @property {import("./api.js").Inputs} inputs
 * @property {Object<string, number>} [noise] noise level of image inputs, by modality
 * @property {boolean} compare whether to generate from each input alone, too
 * @property {number} [steps] refinement steps, shown in turn; without them, the recommended number of the model at once
 */

/**
 * Returns up to three examples: a text to images, a noisy image with and without its text, a refined image. Titles have names
 * without articles, because a name may be any word, in singular or plural.
 *
 * @param {import("./api.js").Modality[]} modalities
 * @param {import("./api.js").Inputs[]} rows example inputs of the bundle, all modalities in each row
 * @returns {Example[]}
 */
export function makeExamples(modalities, rows) {
  const pick = (row, ...names) => Object.fromEntries(names.map((name) => [name, row[name]]));
  const images = modalities.filter((modality) => modality.kind === "image" && isDrawable(modality));
  const text = modalities.find(({ kind }) => kind === "text" || kind === "categorical");
  const row = rows.find((candidate) => !text || candidate[text.name]);
  if (!row) return [];
  const mostChannels = images.toSorted((a, b) => b.channels - a.channels)[0];
  const fewestChannels = images.toSorted((a, b) => a.channels - b.channels)[0];
  const examples = [];
  if (text && mostChannels) {
    examples.push({
      title: `generate ${joinNames(images.map(({ name }) => name))} from ${text.name}`,
      inputs: pick(row, text.name),
      compare: false,
    });
    examples.push({
      title: `noisy ${mostChannels.name}, with and without ${text.name}`,
      inputs: pick(row, mostChannels.name, text.name),
      noise: { [mostChannels.name]: NOISE },
      compare: true,
    });
  }
  if (fewestChannels) {
    examples.push({
      title: `refine ${fewestChannels.name}`,
      inputs: pick(rows[1] ?? row, fewestChannels.name),
      compare: false,
      steps: REFINEMENT_STEPS,
    });
  }
  if (!examples.length) {
    const [{ name }] = modalities;
    examples.push({ title: `generate from ${name}`, inputs: pick(row, name), compare: false });
  }
  return examples;
}
