"use strict";
// Long tables from data: sorted, filtered, a page of rows at a time; links to a row; commands that copy themselves.
(() => {
  const MORE = 500;
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const command = (text) => {
    const box = make("div", { className: "command" }, make("code", { textContent: text }));
    dress(box);
    return box;
  };
  const dress = (box) => {
    if (!navigator.clipboard) return;
    const code = box.querySelector("code");
    const button = make("button", { type: "button", textContent: "Copy" });
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    box.append(button);
  };
  document.querySelectorAll(".command").forEach(dress);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));

  const shown = (value) => {
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const number = Number(value.toPrecision(4));
    return Math.abs(number) < 1e-4 ? number.toExponential() : String(number);
  };
  const SIZES = { "-inf": -Infinity, inf: Number.MAX_VALUE, nan: Infinity };
  const size = (value) => (typeof value === "number" ? value : SIZES[value] ?? -Infinity);

  class LongTable {
    constructor(place, data) {
      this.data = data;
      this.rows = data.anchors.length;
      this.bad = new Set(data.bad);
      this.columns = data.columns;
      this.byAnchor = new Map();
      for (let row = this.rows - 1; row >= 0; row--) this.byAnchor.set(data.anchors[row], row);
      this.order = Uint32Array.from({ length: this.rows }, (_, row) => row);
      this.open = null;
      this.build(place);
      this.filter();
    }

    value(column, row) {
      const { values, words } = this.columns[column];
      return words ? words[values[row]] : values[row];
    }

    text(row) {  // what the filter searches, made when it is first used
      this.texts ??= Array.from({ length: this.rows }, (_, each) =>
        this.columns.map((_, column) => this.value(column, each)).join(" ").toLowerCase());
      return this.texts[row];
    }

    build(place) {
      const changed = () => this.filter();
      this.search = make("input", { type: "search", placeholder: "words, all of them", autocomplete: "off" });
      this.search.addEventListener("input", changed);
      this.only = make("input", { type: "checkbox" });
      this.only.addEventListener("change", changed);
      this.count = make("output");
      this.count.setAttribute("aria-live", "polite");
      const controls = make("div", { className: "controls" }, make("label", {}, "Filter ", this.search));
      this.choices = [];
      this.columns.forEach((column, index) => {
        if (!column.chosen) return;
        const select = make("select", {}, make("option", { value: "", textContent: "any" }));
        column.words.map((word, at) => [word, at]).sort().forEach(([word, at]) =>
          select.append(make("option", { value: at, textContent: word })));
        select.addEventListener("change", changed);
        this.choices.push([index, select]);
        controls.append(make("label", {}, `${column.title} `, select));
      });
      if (this.bad.size) controls.append(make("label", {}, this.only, ` ${this.bad.size.toLocaleString("en")} ${this.data.badly} only`));
      controls.append(this.count);

      const head = make("tr");
      this.heads = this.columns.map((column, index) => {
        const button = make("button", { type: "button", textContent: column.title });
        button.addEventListener("click", () => this.sort(index));
        const cell = make("th", { scope: "col", className: column.kind === "number" ? "number" : "" }, button);
        head.append(cell);
        return cell;
      });
      this.caption = make("caption");
      this.body = make("tbody");
      this.table = make("table", {}, this.caption, make("thead", {}, head), this.body);
      const scroll = make("div", { className: "scroll", tabIndex: 0 }, this.table);
      scroll.setAttribute("role", "region");
      scroll.setAttribute("aria-label", `All ${this.data.noun}`);
      this.more = make("button", { type: "button" });
      this.more.addEventListener("click", () => this.show(MORE));
      place.append(controls, scroll, this.more);
    }

    sort(column) {
      const up = this.heads[column].getAttribute("aria-sort") !== "ascending";
      this.heads.forEach((head) => head.removeAttribute("aria-sort"));
      this.heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
      const { kind, words, values } = this.columns[column];
      const collate = new Intl.Collator("en").compare;
      let keys = values;
      if (kind === "number") keys = values.map(size);
      else if (words) {  // by their places among the sorted words
        const places = [];
        words.map((word, at) => [word, at]).sort((a, b) => collate(a[0], b[0])).forEach((pair, place) => { places[pair[1]] = place; });
        keys = values.map((at) => places[at]);
      }
      const compare = (a, b) => (keys[a] === keys[b] ? a - b : keys[a] < keys[b] ? -1 : 1);
      this.order.sort(up ? compare : (a, b) => compare(b, a));
      this.filter();
    }

    filter() {
      const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = this.choices.filter(([, select]) => select.value !== "").map(([index, select]) => [this.columns[index].values, Number(select.value)]);
      this.kept = [...this.order].filter((row) =>
        (!this.only.checked || this.bad.has(row))
        && chosen.every(([values, at]) => values[row] === at)
        && words.every((word) => this.text(row).includes(word)));
      this.count.textContent = `${this.kept.length.toLocaleString("en")} of ${this.rows.toLocaleString("en")} ${this.data.noun}`;
      this.body.replaceChildren();
      this.drawn = 0;
      this.show(this.data.page);
    }

    show(number) {
      const next = this.kept.slice(this.drawn, this.drawn + number);
      this.body.append(...next.map((row) => this.row(row)));
      this.drawn += next.length;
      const left = this.kept.length - this.drawn;
      this.more.hidden = left === 0;
      this.more.textContent = `Show ${Math.min(MORE, left)} more of ${left.toLocaleString("en")}`;
      this.caption.textContent = `${this.drawn.toLocaleString("en")} of ${this.kept.length.toLocaleString("en")} shown`;
    }

    row(row) {
      const line = make("tr");
      line.dataset.row = row;
      if (this.bad.has(row)) line.className = "wrong";
      this.columns.forEach((column, index) => {
        const value = this.value(index, row);
        if (column.kind === "name") {
          const link = make("a", { href: `#${this.data.anchors[row]}`, textContent: value });
          link.addEventListener("click", (event) => {
            if (event.ctrlKey || event.metaKey || event.shiftKey) return;
            event.preventDefault();
            history.replaceState(null, "", link.href);
            this.toggle(row, line);
          });
          line.append(make("th", { scope: "row" }, link));
        } else if (column.kind === "mark") {
          const bad = this.bad.has(row);
          line.append(make("td", { className: bad ? "bad" : "good", textContent: `${bad ? "✗" : "✓"} ${value}` }));
        } else {
          line.append(make("td", { className: column.kind, textContent: column.kind === "number" ? shown(value) : value }));
        }
      });
      return line;
    }

    toggle(row, line) {
      const was = line.nextElementSibling?.classList.contains("detail");
      this.body.querySelectorAll(".detail").forEach((each) => each.remove());
      this.body.querySelectorAll("[aria-expanded]").forEach((each) => each.removeAttribute("aria-expanded"));
      if (was) return;
      const cell = make("td", { colSpan: this.columns.length });
      const [lines, commands] = this.data.details[row] ?? [[], []];
      if (lines.length) cell.append(make("ul", {}, ...lines.map((text) => make("li", { textContent: text }))));
      (commands.length ? commands : this.repeat(row)).forEach((text) => cell.append(command(text)));
      line.after(make("tr", { className: "detail" }, cell));
      line.querySelector("a").setAttribute("aria-expanded", "true");
    }

    repeat(row) {
      if (!this.data.repeat) return [];
      const [op, name, gate] = this.data.repeated.map((column) => this.value(column, row));
      const test = `[${name}-${gate}]`.split(/[^\p{L}\p{N}_:+\-.[\]\\/]+/u).join(" and ");
      return [this.data.repeat.replace("{0}", () => op).replace("{1}", () => test)];
    }

    reveal(anchor) {
      const row = this.byAnchor.get(anchor);
      if (row === undefined) return false;
      this.search.value = this.value(this.columns.findIndex((column) => column.kind === "name"), row);  // few rows to draw
      this.only.checked = false;
      this.choices.forEach(([, select]) => { select.value = ""; });
      this.filter();
      this.show(Math.max(0, this.kept.indexOf(row) + 1 - this.drawn));
      const line = this.body.querySelector(`[data-row="${row}"]`);
      this.toggle(row, line);
      line.scrollIntoView({ block: "center" });
      line.querySelector("a").focus({ preventScroll: true });
      return true;
    }
  }

  const tables = [...document.querySelectorAll("script[data-table]")].map((script) =>
    new LongTable(document.getElementById(script.dataset.table), JSON.parse(script.textContent)));
  const follow = () => {
    const anchor = decodeURIComponent(location.hash.slice(1));
    if (anchor && !document.getElementById(anchor)) tables.some((table) => table.reveal(anchor));
  };
  addEventListener("hashchange", follow);
  follow();
})();
