// What is asked of the monitor, and its answers in the forms that the views use.

export class ApiError extends Error {
  /** `code` is gRPC's, or UNREACHABLE. */
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/** The JSON behind `path`; empty values of `parameters` are left out, lists repeat their name. */
export async function ask(path, parameters = {}) {
  let response;
  try {
    response = await fetch(address(path, parameters), { cache: "no-store" });
  } catch {
    throw new ApiError("UNREACHABLE", "the monitor does not answer");
  }
  const body = await response.text();
  let answer;
  try {
    answer = JSON.parse(body);
  } catch {
    throw new ApiError("UNREACHABLE", body.slice(0, 300) || `status ${response.status}`);
  }
  if (response.status === 401) askToSignIn(answer.message);
  if (!response.ok) throw new ApiError(answer.code, answer.message);
  return answer;
}

/** Has the page ask for a token. */
export function askToSignIn(reason) {
  dispatchEvent(new CustomEvent("signinneeded", { detail: reason }));
}

export function address(path, parameters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of [value].flat()) if (one !== "" && one !== undefined && one !== null) query.append(name, one);
  }
  return query.size ? `${path}?${query}` : path;
}

/** Address of the view of one trace, at a sentence if one is given. */
export function traceLink(key, sentence) {
  return address("/trace", {
    request_id: key.requestId, engine_instance: key.engineInstance, sample_index: key.sampleIndex || "", sentence,
  });
}

export const externalId = (one) => one.externalId || one.key?.requestId || "";

/** SEVERITY_WARNING -> warning */
export const plain = (name, prefix) => (name ?? "").replace(prefix, "").toLowerCase().replaceAll("_", " ");
export const role = (sentence) => plain(sentence?.role ?? "ROLE_UNSPECIFIED", "ROLE_").replace("unspecified", "unknown");
export const FINDINGS = ["ANCHOR_SHIFT", "PROMPT_DETACHMENT", "ANCHOR_LOCK", "UNTRUSTED_ANCHOR"];
const PROGRESS = ["SENTENCE_CLOSED", "REQUEST_STARTED", "REQUEST_FINISHED"];
export const ALL_KINDS = [...FINDINGS, ...PROGRESS].map((kind) => `EVENT_KIND_${kind}`);

/** What a kind of finding is called and how it is drawn; the sign tells kinds apart without their colour. */
export const KINDS = {
  ANCHOR_SHIFT: { name: "anchor shift", sign: "◆", symbol: "diamond", says: "recent sentences rest on others than those before" },
  PROMPT_DETACHMENT: { name: "prompt detachment", sign: "▼", symbol: "triangle-down", says: "the output looks at the user's prompt less than it did" },
  ANCHOR_LOCK: { name: "anchor lock", sign: "■", symbol: "square", says: "the output repeats itself" },
  UNTRUSTED_ANCHOR: { name: "untrusted anchor", sign: "▲", symbol: "triangle-up", says: "the output rests most on what is labelled untrusted" },
};
export const kindOf = (event) => (event.kind ?? "").replace("EVENT_KIND_", "");

function bytes(base64 = "") {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}
export const floats = (base64) => new Float32Array(bytes(base64).buffer);
export const integers = (base64) => new Uint32Array(bytes(base64).buffer);
