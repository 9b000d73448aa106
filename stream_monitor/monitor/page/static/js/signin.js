// Signing in with a token: it goes to the monitor once, which answers with a cookie that scripts cannot read.
import { h, notice } from "./dom.js";

/** The form; `done()` is called once one is signed in. `reason` says why it is shown. */
export function signIn(reason, done) {
  const field = h("input", { type: "password", id: "token", autocomplete: "off", required: true, spellcheck: "false" });
  const trouble = h("p", { role: "alert" });
  const form = h("form", { class: "filters", onsubmit: submit },
    h("label", { for: "token" }, "Token ", field), h("button", { type: "submit" }, "Sign in"));

  async function submit(event) {
    event.preventDefault();
    const token = field.value.trim();
    field.value = "";
    try {
      const response = await fetch("/api/signin", {
        method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ token }),
      });
      if (response.ok) return done();
      trouble.textContent = (await response.json()).message;
    } catch {
      trouble.textContent = "the monitor does not answer";
    }
    field.focus();
  }

  return notice("info", "Sign in", h("p", {}, `This monitor says: ${reason}.`), form, trouble,
    h("p", {}, "Whoever runs the monitor gives out tokens. This one is not kept in the browser."));
}

export async function signOut() {
  await fetch("/api/signout", { method: "POST" });
}
