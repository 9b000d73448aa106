// The view that the address names; what is connected; the theme.
import { showEvents } from "./events.js";
import { showRequests } from "./requests.js";
import { signIn, signOut } from "./signin.js";
import { watchStatus } from "./status.js";
import { showTrace } from "./trace.js";

const VIEWS = { "/": ["requests", showRequests], "/events": ["events", showEvents], "/trace": ["trace", showTrace] };
const view = document.getElementById("view");
let leave = () => {};

function show() {
  leave();
  const [name, open] = VIEWS[location.pathname] ?? VIEWS["/"];
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.view = name;
  view.replaceChildren();
  leave = open(view, new URLSearchParams(location.search)) ?? (() => {});
}

// Links between views change the address without loading the document again.
document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href]");
  if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
  if (link.origin !== location.origin || !(link.pathname in VIEWS) || link.hasAttribute("download")) return;
  if (link.hash) return;
  event.preventDefault();
  history.pushState(null, "", link.href);
  show();
  view.focus({ preventScroll: true });
  scrollTo(0, 0);
});
addEventListener("popstate", show);

addEventListener("signinneeded", (event) => {
  if (document.getElementById("token")) return;
  leave();
  leave = () => {};
  view.replaceChildren(signIn(event.detail, () => {
    show();
    watchStatus();
  }));
});
document.getElementById("signout").addEventListener("click", async () => {
  await signOut();
  location.reload();
});

const toggle = document.getElementById("theme");
const THEMES = { "": "light", light: "dark", dark: "" };

function nameTheme() {
  const theme = document.documentElement.dataset.theme ?? "";
  toggle.textContent = { "": "◐ system", light: "○ light", dark: "● dark" }[theme];
  toggle.setAttribute("aria-label", `Theme: ${theme || "as the system"}. Change it`);
}

toggle.addEventListener("click", () => {
  const theme = THEMES[document.documentElement.dataset.theme ?? ""];
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // Then it lasts as long as this page.
  }
  nameTheme();
  dispatchEvent(new Event("themechange"));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("themechange")));

nameTheme();
watchStatus();
show();
