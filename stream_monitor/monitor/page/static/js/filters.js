// Filters whose values live in the address, so that a reload or a link keeps them.
import { address } from "./api.js";
import { h } from "./dom.js";

export class Filters {
  #lists = new Map();
  #inputs = new Map();

  /** `fields`: name, label, and either options (a choice) or type, placeholder and list (suggestions). */
  constructor(query, fields, onchange) {
    this.fields = fields;
    this.values = Object.fromEntries(fields.map(({ name }) => [name, query.get(name) ?? ""]));
    const boxes = fields.map((field) => h("label", {}, h("span", {}, field.label), this.#input(field, onchange)));
    const clear = h("button", { type: "button", class: "quiet", onclick: () => this.#clear(onchange) }, "Clear");
    this.element = h("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
      boxes, clear, [...this.#lists.values()]);
  }

  get active() {
    return Object.values(this.values).some(Boolean);
  }

  /** Suggestions for the fields of this list. */
  offer(list, values) {
    const element = this.#lists.get(list);
    const known = new Set([...element.children].map((option) => option.value));
    for (const value of new Set(values)) if (value && !known.has(value)) element.append(h("option", { value }));
  }

  #input(field, onchange) {
    const changed = (event) => {
      this.values[field.name] = event.target.value.trim();
      history.replaceState(null, "", address(location.pathname, this.values));
      onchange();
    };
    if (field.list && !this.#lists.has(field.list)) this.#lists.set(field.list, h("datalist", { id: field.list }));
    const input = field.options
      ? h("select", { name: field.name, onchange: changed }, h("option", { value: "" }, "all"),
        field.options.map((option) => (typeof option === "string" ? [option, option] : option))
          .map(([value, text]) => h("option", { value }, text)))
      : h("input", { name: field.name, type: field.type, placeholder: field.placeholder ?? "all", list: field.list, autocomplete: "off", oninput: changed });
    input.value = this.values[field.name];
    this.#inputs.set(field.name, input);
    return input;
  }

  #clear(onchange) {
    for (const [name, input] of this.#inputs) this.values[name] = input.value = "";
    history.replaceState(null, "", location.pathname);
    onchange();
  }
}
