// The service, asked over HTTP. Addresses are relative, so that the page works below any path.

let key = "";

/** No result: what the service said of it, or that it did not answer. */
export class Refusal extends Error {
  constructor(status, problem, waitMs = 0) {
    super(problem.detail);
    this.status = status;
    this.problem = problem;
    this.waitMs = waitMs;
  }

  /** {modality or option, detail} for every fault that the problem names. */
  get faults() {
    return (this.problem.errors ?? []).map(({ pointer, detail }) => {
      const [, first, , third] = pointer.split("/").map((part) => part.replaceAll("~1", "/").replaceAll("~0", "~"));
      return first === "inputs" && third ? { modality: third, detail } : { option: first, detail };
    });
  }
}

/** Keep an API key, in memory alone. */
export function useKey(given) {
  key = given;
}

export function hasKey() {
  return key !== "";
}

export function address(path) {
  return new URL(path, document.baseURI).href;
}

export const get = (path) => ask(path, {});
export const post = (path, body) =>
  ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** What readiness lacks, in words; empty where all is well. */
export async function unreadiness() {
  try {
    const { checks } = await (await fetch(address("readyz"))).json();
    return Object.values(checks).find((answer) => answer !== "ok") ?? "";
  } catch {
    return "the service does not answer";
  }
}

/** {body, stages: {name: ms}, ms}. Throws Refusal. */
async function ask(path, request) {
  const headers = { ...request.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const started = performance.now();
  let answer, body;
  try {
    answer = await fetch(address(path), { ...request, headers });
    body = await answer.json();
  } catch {
    throw new Refusal(
      0,
      { code: "no_answer", title: "No answer", detail: "the service cannot be reached: does it still run" },
      2000,
    );
  }
  if (!answer.ok) {
    const told = body.error ? { code: body.error.code, title: "Refused", detail: body.error.message } : body;
    const seconds = Number(answer.headers.get("Retry-After") ?? 0);
    throw new Refusal(answer.status, told, told.retry_after_ms ?? 1000 * seconds);
  }
  return { body, ms: performance.now() - started, stages: stages(answer.headers.get("Server-Timing")) };
}

function stages(header) {
  const found = [...(header ?? "").matchAll(/([\w-]+);dur=([\d.]+)/g)];
  return Object.fromEntries(found.map(([, name, ms]) => [name, Number(ms)]));
}
