// Input control of a modality with a frozen encoder: a picture of any size, or a text. The bundle's examples of it are feature
// vectors, which a request may hold as well.

import { element } from "./dom.js";
import { TextField } from "./fields.js";
import { plural } from "./text.js";

const HINT = "Upload, paste or drop a picture, or pick the features of an example.";

/** Has the interface of the controls in fields.js, and `loadFile(file)` for pictures. */
export class EncodedField {
  constructor(modality, onChange, onError) {
    Object.assign(this, { modality, onChange, onError });
    this.preview = element("div", { class: "example-image" });
    this.text = modality.kind === "text" ? new TextField(modality, () => (this.forget(), onChange())) : null;
    if (!this.text) this.loadFile = (file) => this.readFile(file);
    this.fileInput = element("input", {
      type: "file",
      accept: modality.media_types?.join(","),
      hidden: true,
      onchange: () => this.readFile(this.fileInput.files[0]),
    });
    const upload = element(
      "button",
      { type: "button", class: "link-button", "aria-label": `Upload ${modality.name}`, onclick: () => this.fileInput.click() },
      "Upload",
    );
    this.element = element("div", {}, ...(this.text ? [this.text.element] : [upload, this.fileInput]), this.preview);
    this.clear();
  }

  value() {
    return this.current ?? this.text?.value();
  }

  /** @param {string | number[] | {media_type: string, data: string}} value a text, a feature vector or a picture */
  set(value) {
    this.clear();
    if (typeof value === "string") {
      this.text.set(value);
      return;
    }
    this.current = value;
    const picture = () => element("img", { src: `data:${value.media_type};base64,${value.data}`, alt: this.modality.name });
    this.show(Array.isArray(value) ? `${plural(value.length, "feature")} of an example` : picture());
  }

  clear() {
    this.forget();
    this.text?.clear();
  }

  forget() {
    this.current = undefined;
    this.show(this.text ? "" : HINT);
  }

  show(content) {
    this.preview.replaceChildren(content);
    this.preview.hidden = !content;
  }

  /** Loads a file of the user's. The service decodes it, so the browser need not know its format. */
  async readFile(file) {
    if (!file) return;
    const url = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.addEventListener("load", () => resolve(reader.result));
      reader.addEventListener("error", () => reject(reader.error));
      reader.readAsDataURL(file);
    }).catch(() => null);
    this.fileInput.value = "";
    if (url === null) return this.onError(`${file.name || "this file"} cannot be read`);
    this.set({ media_type: file.type, data: url.slice(url.indexOf(",") + 1) });
    this.onChange();
  }
}
