// What is on the screen as a request: lines for a shell and for Python, to copy; and where its time went.

import { address, hasKey } from "./api.js";
import { element } from "./dom.js";

const CALLS = { "cross-generate": "cross_generate", embed: "embed" };

export class Program {
  constructor(place) {
    this.bodies = {};
    this.call = "cross-generate";
    this.language = "curl";
    this.code = element("pre", { tabindex: 0, "aria-label": "Code", id: "lines" });
    this.copied = element("span", { role: "status", class: "hint" });
    place.replaceChildren(
      element(
        "div",
        { class: "choices" },
        this.choice("call", Object.keys(CALLS)),
        this.choice("language", ["curl", "python"]),
        element("button", { type: "button", id: "copy", onclick: () => this.copy() }, "Copy"),
        this.copied,
      ),
      this.code,
    );
  }

  /** @param bodies of the requests, by call. */
  show(bodies) {
    this.bodies = bodies;
    this.draw();
  }

  draw() {
    const body = this.bodies[this.call];
    this.text = body ? (this.language === "curl" ? curl(this.call, body) : python(this.call, body)) : "";
    // The eye needs no base64; the clipboard has all of it.
    this.code.textContent = this.text.replace(
      /[A-Za-z0-9+/=]{96,}/g,
      (data) => `${data.slice(0, 24)}…${data.length} characters…${data.slice(-8)}`,
    );
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.text);
      this.copied.textContent = "Copied.";
    } catch {
      this.code.textContent = this.text;
      getSelection().selectAllChildren(this.code);
      this.copied.textContent = "The browser keeps its clipboard shut: the lines are selected, copy them by hand.";
    }
    setTimeout(() => (this.copied.textContent = ""), 4000);
  }

  choice(what, names) {
    const buttons = names.map((name) =>
      element(
        "button",
        {
          type: "button",
          "aria-pressed": String(name === this[what]),
          onclick: () => {
            this[what] = name;
            buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === name)));
            this.draw();
          },
        },
        name,
      ),
    );
    return element("div", { class: "choice", role: "group", "aria-label": what }, ...buttons);
  }
}

/** The stages of an answer, as Server-Timing has them, and what was spent on the way. */
export function timings(place, { stages, ms }) {
  const spent = Object.entries(stages);
  const way = ms - spent.reduce((sum, [, took]) => sum + took, 0);
  const parts = [...spent, ["network and browser", Math.max(way, 0)]];
  const bar = element("div", { class: "spent", "aria-hidden": "true" });
  for (const [name, took] of parts) {
    const part = element("i", { class: name === "network and browser" ? "way" : name });
    part.style.flexGrow = took;
    bar.append(part);
  }
  const words = parts.map(([name, took]) =>
    element("li", {}, name, " ", element("b", {}, `${took.toFixed(took < 10 ? 1 : 0)} ms`)),
  );
  place.replaceChildren(bar, element("ul", { class: "stages" }, ...words));
}

function curl(call, body) {
  const key = hasKey() ? ` -H "Authorization: Bearer $CONCORD_KEY"` : "";
  return `curl -s ${address(call)}${key} -H 'Content-Type: application/json' -d @- <<'JSON'\n${JSON.stringify(body)}\nJSON`;
}

function python(call, { inputs, encoding_format: _, ...options }) {
  const key = hasKey() ? `, key=os.environ["CONCORD_KEY"]` : "";
  const given = [literal(inputs), ...Object.entries(options).map(([name, value]) => `${name}=${literal(value)}`)];
  return [
    ...(key ? ["import os", ""] : []),
    "from service.client import Client",
    "",
    `with Client("${address("").replace(/\/$/, "")}"${key}) as client:`,
    `    reply = client.${CALLS[call]}(`,
    ...given.map((argument) => `        ${argument},`),
    "    )",
    "    print(reply.results)",
  ].join("\n");
}

/** JSON as Python writes it. */
function literal(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value)
    .map(([name, inner]) => `${JSON.stringify(name)}: ${literal(inner)}`)
    .join(", ")}}`;
}
