// The requests of the page as code to copy: curl, or Python with the project's client.

import { absoluteUrl, hasApiKey } from "./api.js";
import { element } from "./dom.js";

/** The client's method for each endpoint. */
const CLIENT_METHODS = { "cross-generate": "cross_generate", embed: "embed" };
const LONG_BASE64 = /[A-Za-z0-9+/=]{96,}/g;
const MESSAGE_MS = 4000;

export class CodeSnippets {
  constructor(container) {
    this.bodies = {};
    this.endpoint = "cross-generate";
    this.language = "curl";
    this.code = element("pre", { tabindex: 0, role: "group", "aria-label": "Code" });
    this.copyStatus = element("span", { role: "status", class: "hint" });
    container.replaceChildren(
      element(
        "div",
        { class: "snippet-toolbar" },
        this.buttonGroup("endpoint", Object.keys(CLIENT_METHODS)),
        this.buttonGroup("language", ["curl", "python"]),
        element("button", { type: "button", onclick: () => this.copy() }, "Copy"),
        this.copyStatus,
      ),
      this.code,
    );
  }

  /** @param {Object<string, object>} bodies the JSON request body of each endpoint; {} if there are no inputs */
  show(bodies) {
    this.bodies = bodies;
    this.render();
  }

  render() {
    const body = this.bodies[this.endpoint];
    const snippet = this.language === "curl" ? curlSnippet : pythonSnippet;
    this.text = body ? snippet(this.endpoint, body) : "";
    // The screen shows abbreviated files. The clipboard gets the whole text.
    this.code.textContent = this.text.replace(
      LONG_BASE64,
      (data) => `${data.slice(0, 24)}…${data.length} characters…${data.slice(-8)}`,
    );
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.text);
      this.copyStatus.textContent = "Copied.";
    } catch {
      this.code.textContent = this.text;
      getSelection().selectAllChildren(this.code);
      this.copyStatus.textContent = "The browser blocked the clipboard. The code is selected: copy it with the keyboard.";
    }
    setTimeout(() => (this.copyStatus.textContent = ""), MESSAGE_MS);
  }

  /**
   * Creates buttons of which exactly one is pressed.
   *
   * @param {"endpoint" | "language"} property the property of this object that holds the pressed button's name
   * @param {string[]} names
   */
  buttonGroup(property, names) {
    const buttons = names.map((name) =>
      element(
        "button",
        {
          type: "button",
          "aria-pressed": String(name === this[property]),
          onclick: () => {
            this[property] = name;
            buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === name)));
            this.render();
          },
        },
        name,
      ),
    );
    return element("div", { class: "button-group", role: "group", "aria-label": property }, ...buttons);
  }
}

function curlSnippet(endpoint, body) {
  const key = hasApiKey() ? ` -H "Authorization: Bearer $CONCORD_KEY"` : "";
  const json = JSON.stringify(body);
  return `curl -s ${absoluteUrl(endpoint)}${key} -H 'Content-Type: application/json' -d @- <<'JSON'\n${json}\nJSON`;
}

function pythonSnippet(endpoint, { inputs, output, ...others }) {
  const options = { ...others, ...output }; // the client has one option for each kind of output
  const key = hasApiKey() ? `, key=os.environ["CONCORD_KEY"]` : "";
  const optionArguments = Object.entries(options).map(([name, value]) => `${name}=${pythonLiteral(value)}`);
  return [
    ...(key ? ["import os", ""] : []),
    "from concord.client import Client",
    "",
    `with Client("${absoluteUrl("").replace(/\/$/, "")}"${key}) as client:`,
    `    response = client.${CLIENT_METHODS[endpoint]}(`,
    ...[pythonLiteral(inputs), ...optionArguments].map((argument) => `        ${argument},`),
    "    )",
    "    print(response.results)",
  ].join("\n");
}

/** Returns a JSON value as a Python literal. */
function pythonLiteral(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const entries = Object.entries(value).map(([name, inner]) => `${JSON.stringify(name)}: ${pythonLiteral(inner)}`);
  return `{${entries.join(", ")}}`;
}
