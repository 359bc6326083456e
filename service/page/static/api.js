// HTTP client of the service. URLs are relative to the document, so that the page works below any path.

/**
 * One modality of a model, as in GET /v1/models. `kind` decides which of the optional fields are set.
 *
 * @typedef {object} Modality
 * @property {string} name
 * @property {"image" | "audio" | "text" | "vector" | "binary" | "categorical"} kind
 * @property {number} [width] image: pixels
 * @property {number} [height] image: pixels
 * @property {number} [channels] image
 * @property {"black" | "white"} [background] image
 * @property {number} [seconds] audio: length
 * @property {number} [sample_rate] audio: Hz
 * @property {number} [length] text: largest number of units
 * @property {"character" | "word"} [unit] text
 * @property {string} [encoder] image or text: frozen encoder. The other fields are then those of a vector of features
 * @property {{rows: number, values: boolean}} [gallery] training examples that the bundle carries
 * @property {number} [size] vector: number of components
 * @property {string[]} [attributes] binary: names
 * @property {string[]} [classes] categorical: names
 */

/**
 * One model, as in GET /v1/models.
 *
 * @typedef {object} Model
 * @property {string} id name of the bundle
 * @property {string} version
 * @property {number} latent dimensions of an embedding
 * @property {Modality[]} modalities
 * @property {number | null} recommended_refine_steps
 * @property {{max_items: number, max_samples: number, max_refine_steps: number}} limits
 */

/**
 * The inputs of one item: a JSON value of a request for each modality that is present.
 *
 * @typedef {Object<string, any>} Inputs
 */

/**
 * A diagonal Gaussian over the latent space. Both arrays have one number per latent dimension.
 *
 * @typedef {{mean: number[], log_var: number[]}} Posterior
 */

let apiKey = "";

/** A request without a result: the service responded with an error, or did not respond (status 0). */
export class ApiError extends Error {
  /**
   * @param {number} status HTTP status
   * @param {{code: string, title?: string, detail: string, errors?: object[]}} problem as in RFC 9457
   * @param {number} retryAfterMs milliseconds after which a retry may succeed; 0 if it cannot
   */
  constructor(status, problem, retryAfterMs = 0) {
    super(problem.detail);
    this.status = status;
    this.problem = problem;
    this.retryAfterMs = retryAfterMs;
  }

  /**
   * The invalid fields of the request body: each is an input (`modality`) or an option.
   *
   * @returns {{modality?: string, option?: string, detail: string}[]}
   */
  get fieldErrors() {
    return (this.problem.errors ?? []).map(({ pointer, detail }) => {
      const [, field, , modality] = pointer.split("/").map((part) => part.replaceAll("~1", "/").replaceAll("~0", "~"));
      return field === "inputs" && modality ? { modality, detail } : { option: field, detail };
    });
  }
}

/** Send this API key with every request. It is kept in memory only. */
export function setApiKey(key) {
  apiKey = key;
}

export function hasApiKey() {
  return apiKey !== "";
}

/** The absolute URL of a path of the service. */
export function absoluteUrl(path) {
  return new URL(path, document.baseURI).href;
}

export const get = (path) => send(path, {});
export const post = (path, body) =>
  send(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** Returns the message of the first failed readiness check; "" if the service is ready. */
export async function readinessFailure() {
  try {
    const { checks } = await (await fetch(absoluteUrl("readyz"))).json();
    return Object.values(checks).find((result) => result !== "ok") ?? "";
  } catch {
    return "the service does not respond";
  }
}

/**
 * @returns {Promise<{body: any, ms: number, stages: Object<string, number>}>} the JSON body, the duration of the request, and
 *   the milliseconds of each stage in the Server-Timing header
 * @throws {ApiError}
 */
async function send(path, options) {
  const headers = { ...options.headers, ...(apiKey && { Authorization: `Bearer ${apiKey}` }) };
  const start = performance.now();
  let response, body;
  try {
    response = await fetch(absoluteUrl(path), { ...options, headers });
    body = await response.json();
  } catch {
    const detail = "the service cannot be reached: check that it is running";
    throw new ApiError(0, { code: "no_response", title: "No response", detail }, 2000);
  }
  if (!response.ok) {
    // Routes below /v1 send errors in OpenAI's format.
    const problem = body.error ? { code: body.error.code, detail: body.error.message } : body;
    const seconds = Number(response.headers.get("Retry-After") ?? 0);
    throw new ApiError(response.status, problem, problem.retry_after_ms ?? 1000 * seconds);
  }
  return { body, ms: performance.now() - start, stages: parseServerTiming(response.headers.get("Server-Timing")) };
}

function parseServerTiming(header) {
  const matches = [...(header ?? "").matchAll(/([\w-]+);dur=([\d.]+)/g)];
  return Object.fromEntries(matches.map(([, name, ms]) => [name, Number(ms)]));
}
