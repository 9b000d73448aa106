// Events as they come, across restarts of the monitor. Says how the connection is on the page's top line.
import { address, askToSignIn } from "./api.js";

const RETRY_MILLISECONDS = 3000;
const POLL_MILLISECONDS = 5000;
const light = document.getElementById("link");

function say(state, text) {
  light.className = `link ${state}`;
  light.textContent = text;
}

/**
 * One subscription of a view. `onevent(event)` gets each event; `onchange()` is called when events may have been missed:
 * at the start, after a break, and every few seconds while the monitor takes no more live pages.
 * A page that nobody looks at closes its stream, since a browser has only six connections to a monitor.
 */
export class Live {
  #source = null;
  #timer = null;
  #cursor = "";
  #since = null;

  constructor(parameters, onevent, onchange) {
    this.parameters = parameters;
    this.onevent = onevent;
    this.onchange = onchange;
    this.onvisible = () => (document.hidden ? this.#disconnect() : this.#connect());
    document.addEventListener("visibilitychange", this.onvisible);
    this.#connect();
  }

  close() {
    document.removeEventListener("visibilitychange", this.onvisible);
    this.#disconnect();
  }

  #disconnect() {
    this.#source?.close();
    this.#source = null;
    clearTimeout(this.#timer);
  }

  #connect() {
    this.#disconnect();
    // `last` counts where there is no cursor, or one of another start of the monitor: then what it holds is told again.
    const source = new EventSource(address("/api/events", { ...this.parameters, cursor: this.#cursor }));
    this.#source = source;
    source.addEventListener("event", (message) => this.#take(message));
    source.addEventListener("gone", () => this.#gone());
    source.addEventListener("error", () => this.#broken(source));
  }

  #take(message) {
    this.#cursor = message.lastEventId;
    const { event, lost } = JSON.parse(message.data);
    if (Number(lost ?? 0)) {
      say("warn", `live; ${lost} updates were too many for this page and were skipped`);
      this.onchange();
    }
    if (event) {
      this.onevent(event);
      return;
    }
    this.#since = null;
    say("ok", "live");
    this.onchange();
  }

  #gone() {
    this.#cursor = "";
    this.onchange();
  }

  async #broken(source) {
    if (source !== this.#source) return;
    this.#since ??= new Date();
    // The browser connects again by itself, except after an answer that was no stream.
    const refused = source.readyState === EventSource.CLOSED;
    let reason = null;
    try {
      const response = await fetch("/api/status", { cache: "no-store" });
      if (response.status === 401) askToSignIn((await response.json()).message);
      if (response.ok && refused) reason = "as many pages are live as the monitor allows; this one looks every 5 s";
    } catch {
      // It does not answer.
    }
    if (source !== this.#source || this.#since === null) return;
    say("warn", reason ?? `the monitor does not answer since ${this.#since.toLocaleTimeString()}; trying again`);
    if (!refused) return;
    if (reason) this.onchange();
    this.#timer = setTimeout(() => this.#connect(), reason ? POLL_MILLISECONDS : RETRY_MILLISECONDS);
  }
}

/** Calls `work` soon, and never more of the time than a tenth: the answer to a long trace takes the monitor a while. */
export class Throttle {
  #timer = null;
  #running = false;
  #again = false;
  #next = 0;

  constructor(work, least = 700) {
    this.work = work;
    this.least = least;
  }

  call() {
    if (this.#running) this.#again = true;
    else this.#timer ??= setTimeout(() => this.#run(), Math.max(0, this.#next - performance.now()));
  }

  stop() {
    clearTimeout(this.#timer);
    this.#timer = 0;
  }

  async #run() {
    this.#running = true;
    const begun = performance.now();
    try {
      await this.work();
    } finally {
      this.#running = false;
      const now = performance.now();
      this.#next = now + Math.max(this.least, 9 * (now - begun));
      if (this.#timer !== 0) this.#timer = null;
      if (this.#again && this.#timer === null) {
        this.#again = false;
        this.call();
      }
    }
  }
}
