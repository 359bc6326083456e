// Sounds: the input control, with microphone and upload, and the player of a generated sound with its spectrogram.

import { element } from "./dom.js";
import { bytesFromBase64, renderChannels } from "./images.js";

const MARGIN_SECONDS = 1; // recorded in addition, because people start late: the service keeps the loudest part
const UNPROCESSED = { echoCancellation: false, noiseSuppression: false, autoGainControl: false }; // made for calls
const BYTES_PER_CALL = 0x8000; // of String.fromCharCode, whose number of arguments is limited

/** Has the interface of the controls in fields.js, and `loadFile(file)`. */
export class SoundField {
  /**
   * @param {import("./api.js").Modality} modality
   * @param {() => void} onChange runs when the user changes the sound
   * @param {(detail: string) => void} onError runs with a message when there is no sound
   */
  constructor(modality, onChange, onError) {
    this.modality = modality;
    this.onChange = onChange;
    this.onError = onError;
    this.player = element("div", { class: "sound-input" });
    this.fileInput = element("input", {
      type: "file",
      accept: "audio/*",
      hidden: true,
      onchange: () => this.loadFile(this.fileInput.files[0]),
    });
    this.recordButton = element(
      "button",
      {
        type: "button",
        "aria-pressed": "false",
        "aria-label": `Record ${modality.name}`,
        hidden: !navigator.mediaDevices || !window.MediaRecorder, // browsers offer the microphone to secure pages only
        onclick: () => (this.recorder ? this.recorder.stop() : this.record()),
      },
      "Record",
    );
    this.element = element(
      "div",
      {},
      this.player,
      element(
        "div",
        { class: "sound-tools" },
        this.recordButton,
        element(
          "button",
          { type: "button", class: "link-button", "aria-label": `Upload ${modality.name}`, onclick: () => this.fileInput.click() },
          "Upload",
        ),
        this.fileInput,
      ),
    );
    this.clear();
  }

  value() {
    return this.current;
  }

  set(value) {
    this.current = value;
    this.player.replaceChildren(renderPlayer(value, `${this.modality.name}, input`));
  }

  clear() {
    this.current = undefined;
    this.player.replaceChildren();
  }

  /** Loads an audio file of the user's. The service decodes it. */
  async loadFile(file) {
    if (!file) return;
    this.set({ media_type: file.type, data: toBase64(new Uint8Array(await file.arrayBuffer())) });
    this.fileInput.value = "";
    this.onChange();
  }

  /** Records until the user stops, or for the length of the modality and a second. */
  async record() {
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ audio: UNPROCESSED });
      const recorder = (this.recorder = new MediaRecorder(stream));
      const parts = [];
      recorder.ondataavailable = ({ data }) => parts.push(data);
      const stopped = new Promise((resolve) => (recorder.onstop = resolve));
      recorder.start();
      this.showRecording(true);
      const timer = setTimeout(() => recorder.stop(), 1000 * (this.modality.seconds + MARGIN_SECONDS));
      await stopped;
      clearTimeout(timer);
      for (const track of stream.getTracks()) track.stop();
      this.set({ media_type: "audio/wav", data: await toWav(new Blob(parts), this.modality.sample_rate) });
      this.onChange();
    } catch (error) {
      this.onError(`the microphone cannot be used (${error.message}): upload a file`);
    }
    this.recorder = null;
    this.showRecording(false);
  }

  showRecording(recording) {
    this.recordButton.setAttribute("aria-pressed", String(recording));
    this.recordButton.textContent = recording ? "Stop" : "Record";
  }
}

/**
 * Creates a player of a generated sound, below its spectrogram.
 *
 * @param {object} value as in the response of POST /cross-generate
 * @param {string} label text for screen readers
 */
export function renderSound(value, label) {
  const { shape, data } = value.spectrogram;
  const [channels, height, width] = shape;
  const numbers = new Float32Array(bytesFromBase64(data).buffer);
  const lowestLast = numbers.map((_, i) => numbers[(height - 1 - Math.floor(i / width)) * width + (i % width)]);
  const spectrogram = renderChannels({ channels, width, height }, lowestLast, `spectrogram of ${label}`);
  return element("div", { class: "sound-value" }, spectrogram, renderPlayer(value, label));
}

function renderPlayer({ media_type, data }, label) {
  return element("audio", { controls: true, src: `data:${media_type || "audio/wav"};base64,${data}`, "aria-label": label });
}

/** Decodes a recording and returns it as a mono WAV file of 16 bits at a sample rate, in base64. */
async function toWav(recording, rate) {
  const decoded = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await recording.arrayBuffer());
  const channels = Array.from({ length: decoded.numberOfChannels }, (_, i) => decoded.getChannelData(i));
  const view = new DataView(new ArrayBuffer(44 + 2 * decoded.length));
  const writeText = (offset, text) => [...text].forEach((c, i) => view.setUint8(offset + i, c.charCodeAt(0)));
  writeText(0, "RIFF");
  view.setUint32(4, 36 + 2 * decoded.length, true);
  writeText(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  writeText(36, "data");
  view.setUint32(40, 2 * decoded.length, true);
  for (let i = 0; i < decoded.length; i++) {
    const mean = channels.reduce((sum, samples) => sum + samples[i], 0) / channels.length;
    view.setInt16(44 + 2 * i, 32767 * Math.min(Math.max(mean, -1), 1), true);
  }
  return toBase64(new Uint8Array(view.buffer));
}

function toBase64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += BYTES_PER_CALL) text += String.fromCharCode(...bytes.subarray(i, i + BYTES_PER_CALL));
  return btoa(text);
}
