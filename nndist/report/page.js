"use strict";
// Draws the curves of report.html and index.html, and sorts the table of the index. Whatever comes from a run is set as
// text or as an attribute, never as HTML. Served by `nndist watch`, a page asks for itself again and takes over what is new.

(() => {
  const dataOf = (page) => JSON.parse(page.getElementById("data").textContent);
  let data = dataOf(document);
  const POLL_MS = 2000; // between questions to `nndist watch`
  const NUM_COLOURS = 8;
  const DASHES = ["", "7 4", "2 3", "10 3 2 3"]; // the ninth series has the first colour again, dashed

  // What a reader has chosen outlives the page's reloads; `history.state` works for file:// in every browser.
  const chosen = Object.assign({ hidden: {}, log: {} }, history.state);
  const keepChosen = () => history.replaceState(chosen, "");

  function element(name, attributes = {}, ...children) {
    const svg = ["svg", "path", "line", "circle", "text", "g", "rect"].includes(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function number(value, digits = 5) {
    if (value === null || value === undefined) return "not finite";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) {
      return Number.isInteger(value) && size < 1e9
        ? value.toLocaleString("en-US")
        : value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
    }
    return value.toLocaleString("en-US", { maximumSignificantDigits: size >= 1e4 ? 7 : digits });
  }

  function linearTicks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
    return ticks.map((tick) => Number(tick.toPrecision(12)));
  }

  function logTicks(low, high, count) {
    const first = Math.floor(Math.log10(low));
    const last = Math.ceil(Math.log10(high));
    const every = Math.max(1, Math.ceil((last - first) / count));
    const ticks = (multiples) => {
      const found = [];
      for (let e = first; e <= last; e += every) {
        for (const m of multiples) found.push(Number(`${m}e${e}`));
      }
      return found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    };
    const choices = [[1], [1, 3], [1, 2, 5]].map(ticks);
    return choices.find((found) => found.length >= 3) ?? linearTicks(low, high, count).filter((tick) => tick > 0);
  }

  // The place of the point of ascending `xs` that is nearest to x.
  function nearest(xs, x) {
    let low = 0;
    let high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1;
      else high = middle;
    }
    return low > 0 && x - xs[low - 1] <= xs[low] - x ? low - 1 : low;
  }

  // One panel: heading, curves, readout and legend.
  // spec: {title, unit, log, byEpoch, series: [{name, colour, thin, step, epoch, value}]}
  class Chart {
    constructor(host, key) {
      this.key = key;
      this.hidden = new Set(chosen.hidden[key] ?? []);
      this.heading = element("h3");
      this.logButton = element("button", { type: "button", class: "toggle" }, "log scale");
      this.logButton.addEventListener("click", () => {
        this.log = chosen.log[key] = !this.log;
        keepChosen();
        this.draw();
      });
      this.plot = element("div", { class: "plot" });
      this.readout = element("div", { class: "readout", role: "status", hidden: "" });
      this.legend = element("ul", { class: "legend" });
      this.pointed = null; // the step or epoch whose values are read
      host.append(element("header", {}, this.heading, this.logButton), this.plot, this.legend);
      new ResizeObserver(() => {
        if (Math.abs(this.plot.clientWidth - this.width) > 1) this.draw();
      }).observe(this.plot);
    }

    set(spec) {
      this.spec = spec;
      this.log = chosen.log[this.key] ?? spec.log;
      this.heading.textContent = spec.title + (spec.unit ? `, ${spec.unit}` : "");
      const pressed = [...this.legend.children].findIndex((item) => item.contains(document.activeElement));
      this.legend.replaceChildren(...spec.series.map((series) => element("li", {}, this.legendButton(series))));
      this.legend.children[pressed]?.firstChild.focus({ preventScroll: true });
      this.draw();
    }

    legendButton(series) {
      const line = element("line", { x1: 0, x2: 22, y1: 5, y2: 5, "stroke-width": series.thin ? 1.5 : 3 });
      line.setAttribute("stroke-dasharray", DASHES[Math.floor(series.colour / NUM_COLOURS) % DASHES.length]);
      const swatch = element("svg", { viewBox: "0 0 22 10", class: colourClass(series), "aria-hidden": "true" }, line);
      const last = series.value.findLast((value) => value !== null);
      const value = last === undefined ? "no value" : this.text(last);
      const button = element(
        "button",
        { type: "button", "aria-pressed": String(!this.hidden.has(series.name)), title: "Show or hide this curve" },
        swatch,
        element("span", {}, series.name),
        element("span", { class: "soft" }, value),
      );
      button.addEventListener("click", () => {
        if (!this.hidden.delete(series.name)) this.hidden.add(series.name);
        button.setAttribute("aria-pressed", String(!this.hidden.has(series.name)));
        chosen.hidden[this.key] = [...this.hidden];
        keepChosen();
        this.draw();
      });
      return button;
    }

    text(value) {
      return number(value) + (this.spec.unit && value !== null ? ` ${this.spec.unit}` : "");
    }

    draw() {
      const { spec } = this;
      if (!spec) return;
      this.readout.hidden = true;
      const [pointed, focused] = [this.pointed, this.plot.contains(document.activeElement)];
      const xs = (series) => (spec.byEpoch ? series.epoch : series.step);
      const shown = spec.series.filter((series) => !this.hidden.has(series.name) && !xs(series).includes(null));
      const positive = spec.series.some((series) => series.value.some((value) => value > 0));
      this.logButton.hidden = !positive || spec.unit === "%";
      const log = this.log && positive;
      this.logButton.setAttribute("aria-pressed", String(log));
      const usable = (value) => value !== null && (!log || value > 0);
      const width = (this.width = Math.max(260, this.plot.clientWidth));
      const height = Math.round(Math.min(340, Math.max(210, width * 0.5)));

      let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
      for (const series of shown) {
        series.value.forEach((value, place) => {
          if (!usable(value)) return;
          left = Math.min(left, xs(series)[place]);
          right = Math.max(right, xs(series)[place]);
          low = Math.min(low, value);
          high = Math.max(high, value);
        });
      }
      const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0" });
      this.plot.replaceChildren(svg, this.readout);
      if (left > right) {
        const why = shown.length ? "No value to draw" : "Every curve is hidden";
        svg.setAttribute("aria-label", `${spec.title}: ${why}`);
        svg.append(element("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, why));
        return;
      }
      if (left > 0 && left < right / 2) left = 0;
      if (left === right) [left, right] = [left - (left > 1 ? 1 : 0.5), right + (left > 1 ? 1 : 0.5)];
      if (log) {
        const pad = low === high ? 2 : (high / low) ** 0.04;
        [low, high] = [low / pad, high * pad];
      } else {
        const pad = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.05;
        [low, high] = [low - pad, high + pad];
      }
      const yTicks = log ? logTicks(low, high, 6) : linearTicks(low, high, 5);
      const yTexts = yTicks.map((tick) => number(tick, 4));
      const margin = { left: 14 + 7 * Math.max(...yTexts.map((text) => text.length)), right: 14, top: 10, bottom: 42 };
      const inner = { width: width - margin.left - margin.right, height: height - margin.top - margin.bottom };
      const scale = log ? Math.log : (value) => value;
      const xOf = (x) => margin.left + ((x - left) / (right - left)) * inner.width;
      const yOf = (y) =>
        margin.top + inner.height * (1 - (scale(y) - scale(low)) / (scale(high) - scale(low)));

      yTicks.forEach((tick, place) => {
        const y = yOf(tick).toFixed(1);
        svg.append(element("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y, y2: y }));
        svg.append(element("text", { x: margin.left - 6, y, dy: "0.32em", "text-anchor": "end" }, yTexts[place]));
      });
      const bottom = height - margin.bottom;
      svg.append(element("line", { class: "axis", x1: margin.left, x2: width - margin.right, y1: bottom, y2: bottom }));
      for (const tick of linearTicks(left, right, Math.max(2, Math.floor(inner.width / 70)))) {
        const x = xOf(tick).toFixed(1);
        svg.append(element("line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
        svg.append(element("text", { x, y: bottom + 17, "text-anchor": "middle" }, number(tick)));
      }
      const axis = { x: margin.left + inner.width / 2, y: height - 6, "text-anchor": "middle" };
      svg.append(element("text", axis, spec.byEpoch ? "epoch" : "optimizer step"));

      for (const series of shown) {
        const curve = element("g", { class: colourClass(series), "data-series": series.name });
        const dots = series.value.length <= 40 && !series.thin;
        let path = "";
        let broken = true;
        series.value.forEach((value, place) => {
          if (!usable(value)) {
            broken = true; // what is not finite leaves a gap
            return;
          }
          const at = [xOf(xs(series)[place]).toFixed(1), yOf(value).toFixed(1)];
          path += `${broken ? "M" : "L"}${at}`;
          const alone = broken && !usable(series.value[place + 1] ?? null);
          if (dots || alone) curve.append(element("circle", { class: "dot", cx: at[0], cy: at[1], r: 2.7 }));
          broken = false;
        });
        const dash = DASHES[Math.floor(series.colour / NUM_COLOURS) % DASHES.length];
        curve.prepend(element("path", { class: series.thin ? "curve thin" : "curve", d: path, "stroke-dasharray": dash }));
        svg.append(curve);
      }
      const ends = shown.map((series) => {
        const values = series.value.filter((value) => value !== null);
        return values.length ? `${series.name} from ${this.text(values[0])} to ${this.text(values.at(-1))}` : series.name;
      });
      svg.setAttribute("aria-label", `Curves of ${spec.title}: ${ends.join("; ")}. Arrow keys read the values.`);
      this.readable(svg, shown, { xs, xOf, yOf, usable, margin, height, left, right, inner, width }, pointed);
      if (focused) svg.focus({ preventScroll: true });
    }

    // Pointer and arrow keys read the values at a step.
    readable(svg, shown, { xs, xOf, yOf, usable, margin, height, left, right, inner, width }, pointed) {
      const marks = element("g");
      svg.append(marks);
      const steps = [...new Set(shown.flatMap(xs))].sort((a, b) => a - b);
      let place = null;
      const show = (at) => {
        place = at;
        const x = (this.pointed = steps[place]);
        const rows = [];
        marks.replaceChildren(
          element("line", { class: "cursor", x1: xOf(x), x2: xOf(x), y1: margin.top, y2: height - margin.bottom }),
        );
        let here = null;
        for (const series of shown) {
          if (!series.value.length) continue;
          const own = nearest(xs(series), x);
          const value = series.value[own];
          const same = xs(series)[own] === x;
          if (same) here ??= { step: series.step[own], epoch: series.epoch[own] };
          if (usable(value)) {
            const ring = { class: `ring ${colourClass(series)}`, cx: xOf(xs(series)[own]), cy: yOf(value), r: 3.5 };
            marks.append(element("circle", ring));
          }
          const elsewhere = recordedAt(series, own, same, this.spec.byEpoch);
          rows.push(
            element(
              "tr",
              {},
              element("th", { class: colourClass(series) }, element("span", { class: "mark" }), series.name),
              element("td", { class: "number" }, this.text(value)),
              element("td", { class: "soft" }, elsewhere),
            ),
          );
        }
        const epoch = here.epoch === null ? "" : `, epoch ${number(here.epoch)}`;
        this.readout.replaceChildren(
          element("p", {}, `step ${here.step.toLocaleString("en-US")}${epoch}`),
          element("table", {}, element("tbody", {}, ...rows)),
        );
        this.readout.hidden = false;
        // beside the cursor, on the side with more room, or below the plot where it would cover the cursor
        const across = (xOf(x) / width) * this.plot.clientWidth;
        const own = this.readout.offsetWidth + 14;
        const toTheRight = across < this.plot.clientWidth / 2;
        const fits = own <= Math.max(across, this.plot.clientWidth - across);
        this.readout.style.left = fits ? `${toTheRight ? across + 14 : across - own}px` : "0px";
        this.readout.style.top = fits ? "0px" : `${this.plot.clientHeight}px`;
      };
      const hide = () => {
        place = this.pointed = null;
        marks.replaceChildren();
        this.readout.hidden = true;
      };
      const point = (event) => {
        const box = svg.getBoundingClientRect();
        const across = ((event.clientX - box.left) / box.width) * width;
        show(nearest(steps, left + ((across - margin.left) / inner.width) * (right - left)));
      };
      svg.addEventListener("pointermove", point);
      svg.addEventListener("pointerdown", point);
      svg.addEventListener("pointerleave", hide);
      svg.addEventListener("blur", hide);
      svg.addEventListener("keydown", (event) => {
        const stride = event.shiftKey ? 10 : 1;
        const to = {
          ArrowLeft: (place ?? steps.length) - stride,
          ArrowRight: (place ?? -1) + stride,
          Home: 0,
          End: steps.length - 1,
        }[event.key];
        if (event.key === "Escape") hide();
        if (to === undefined) return;
        event.preventDefault();
        show(Math.max(0, Math.min(steps.length - 1, to)));
      });
      if (pointed !== null) show(nearest(steps, pointed)); // drawn anew while it is read
    }
  }

  // Where a series was not recorded at the step that is read, its nearest record is shown, and said where it is.
  function recordedAt(series, own, same, byEpoch) {
    if (same) return "";
    return byEpoch ? `at epoch ${number(series.epoch[own])}` : `at step ${series.step[own].toLocaleString("en-US")}`;
  }

  function colourClass(series) {
    return `c${series.colour % NUM_COLOURS}`;
  }

  // A run's page.

  const charts = new Map(); // by title

  function drawPanels() {
    const place = document.getElementById("panels");
    data.panels.forEach((panel, number) => {
      if (!charts.has(panel.title)) {
        const host = element("section", { class: "panel" });
        charts.set(panel.title, { host, chart: new Chart(host, `panel ${panel.title}`), notes: [], drawn: "" });
      }
      const one = charts.get(panel.title);
      if (place.children[number] !== one.host) place.insertBefore(one.host, place.children[number] ?? null);
      const text = JSON.stringify(panel);
      if (one.drawn === text) return;
      one.drawn = text;
      one.chart.set(panel);
      one.notes.forEach((note) => note.remove());
      one.notes = panel.notes.map((note) => element("p", { class: "small soft" }, note));
      one.host.append(...one.notes);
    });
    const titles = new Set(data.panels.map((panel) => panel.title));
    for (const [title, { host }] of charts) {
      if (titles.has(title)) continue;
      host.remove();
      charts.delete(title);
    }
  }

  // What is beside the curves is exchanged for what is new in `next`, the page as it is now; the curves stay and grow.
  function takeRun(next) {
    const main = document.querySelector("main");
    const curves = document.getElementById("panels").parentElement;
    const before = [...main.children];
    const fresh = [...document.adoptNode(next.querySelector("main")).children];
    const middle = fresh.findIndex((part) => part.querySelector("#panels"));
    const kept = fresh.map((part) => before.find((old) => old !== curves && old.isEqualNode(part)) ?? part);
    const [across, down] = [scrollX, scrollY];
    before.forEach((old) => old === curves || old.remove());
    curves.before(...kept.slice(0, middle));
    curves.after(...kept.slice(middle + 1));
    curves.querySelectorAll(":scope > p").forEach((nothing) => data.panels.length && nothing.remove());
    drawPanels();
    scrollTo(across, down);
    sayAge();
  }

  function age(seconds) {
    if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
    if (seconds < 5400) return `${Math.round(seconds / 60)} minutes`;
    return seconds < 172800 ? `${Math.round(seconds / 3600)} hours` : `${Math.round(seconds / 86400)} days`;
  }

  function sayAge() {
    const said = document.getElementById("age");
    if (data.updated === null || !data.running) return;
    const since = Date.now() / 1000 - data.updated;
    const silent = since > data.stale_seconds;
    said.textContent = `(${age(since)} ago)` + (silent ? " Nothing was written since: it may have been killed." : "");
    said.classList.toggle("warning", silent);
  }

  // While the run lives its page is rewritten at each evaluation; reloading keeps the scroll position.
  function follow() {
    const reload = () => {
      if (getSelection().isCollapsed) location.reload(); // not while somebody copies from the page
      else setTimeout(reload, data.refresh_seconds * 1000);
    };
    setTimeout(reload, data.refresh_seconds * 1000);
  }

  // Asks `nndist watch` for this page again and hands a changed one to `take`; a page of another kind is loaded.
  function watch(take) {
    const said = element("p", { id: "live", class: "small soft", role: "status" }, "live");
    document.body.append(said);
    const ask = async () => {
      const began = performance.now();
      const busy = document.hidden || !getSelection().isCollapsed; // or somebody copies from the page
      try {
        const headers = { "If-None-Match": `"${data.version}"` };
        const answer = busy ? null : await fetch(location.pathname, { headers, cache: "no-store" });
        if (answer !== null && answer.status !== 304) {
          const next = new DOMParser().parseFromString(await answer.text(), "text/html");
          const fresh = dataOf(next);
          if (fresh.page !== data.page || !take) return location.reload();
          data = fresh;
          document.title = next.title;
          take(next);
        }
        said.textContent = "live";
      } catch {
        said.textContent = "nndist watch does not answer; this is what it last said";
      }
      said.classList.toggle("warning", said.textContent !== "live");
      setTimeout(ask, Math.max(POLL_MS, 20 * (performance.now() - began))); // a page of long curves costs time to make
    };
    setTimeout(ask, POLL_MS);
  }

  // The index.

  function compareRuns() {
    const table = document.querySelector(".runs");
    let [rows, runs] = [[], new Map()];
    const metric = document.getElementById("metric");
    const axis = document.getElementById("axis");
    const filter = document.getElementById("filter");
    const colours = new Map(); // key of a selected run -> colour, which it keeps until it is taken out
    const chart = new Chart(document.getElementById("comparison"), "comparison");

    const recorded = (run) => Object.hasOwn(runs.get(run)?.series ?? {}, metric.value);
    const draw = () => {
      const percent = data.percent.includes(metric.value);
      const series = [...colours]
        .filter(([run]) => recorded(run))
        .map(([run, colour]) => ({ name: runs.get(run).name, colour, thin: false, ...runs.get(run).series[metric.value] }));
      const missing = colours.size - series.length;
      document.getElementById("missing").textContent = !colours.size
        ? "Select runs in the table to compare their curves."
        : missing
          ? `${missing} of the selected runs did not record ${metric.value}.`
          : "";
      chart.set({
        title: metric.value,
        unit: percent ? "%" : "",
        log: !percent && /loss/.test(metric.value),
        byEpoch: axis.value === "epoch",
        series,
      });
    };
    const select = (row, wanted) => {
      const run = row.dataset.run;
      const box = row.querySelector("input");
      if (!box || box.disabled) return;
      box.checked = wanted;
      const mark = row.querySelector(".mark");
      if (wanted && !colours.has(run)) {
        const taken = new Set(colours.values());
        let colour = 0;
        while (taken.has(colour)) colour++;
        colours.set(run, colour);
        mark.className = `mark c${colour % NUM_COLOURS}`;
        chart.hidden.delete(runs.get(run).name); // taken in again, it is not still switched off in the legend
      } else if (!wanted) {
        colours.delete(run);
        mark.className = "mark";
      }
    };
    const sort = (header, descending) => {
      const column = header.cellIndex;
      const numeric = header.classList.contains("number");
      const keyOf = (row) => {
        if (row.classList.contains("broken") && column > 2) return ""; // it has its name only
        return row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
      };
      const compare = numeric
        ? (a, b) => Number(a) - Number(b)
        : (a, b) => a.localeCompare(b, undefined, { numeric: true, sensitivity: "base" });
      const keyed = rows.map((row) => [keyOf(row), row]);
      const known = keyed.filter(([key]) => key !== "").sort((a, b) => (descending ? -1 : 1) * compare(a[0], b[0]));
      const unknown = keyed.filter(([key]) => key === ""); // last, whichever way it is sorted
      table.tBodies[0].append(...[...known, ...unknown].map(([, row]) => row));
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    };

    for (const button of table.tHead.querySelectorAll("button")) {
      const header = button.closest("th");
      button.addEventListener("click", () => {
        const before = header.getAttribute("aria-sort");
        // scores and dates are looked for at their upper end, names at the letter A
        const first = header.classList.contains("number") || header.dataset.first === "descending";
        sort(header, before ? before === "ascending" : first);
      });
    }
    const shownRows = () => rows.filter((row) => !row.hidden);
    document.getElementById("all").addEventListener("click", () => {
      shownRows().forEach((row) => select(row, true));
      draw();
    });
    document.getElementById("none").addEventListener("click", () => {
      rows.forEach((row) => select(row, false));
      draw();
    });
    const sift = () => {
      const words = filter.value.toLowerCase().split(/\s+/);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      document.getElementById("count").textContent = `${shownRows().length} of ${rows.length} runs`;
    };
    filter.addEventListener("input", sift);
    metric.addEventListener("change", draw);
    axis.addEventListener("change", draw);
    // Begins with the rows of the table, or goes on with those of a newer page: what was chosen stays chosen.
    const take = (next) => {
      const known = new Set(runs.keys());
      runs = new Map(data.runs.map((run) => [run.key, run]));
      if (next) {
        table.tBodies[0].replaceChildren(...document.adoptNode(next.querySelector(".runs")).tBodies[0].rows);
        document.querySelector("main > header").replaceWith(document.adoptNode(next.querySelector("main > header")));
      }
      rows = [...table.tBodies[0].rows];
      const names = [...metric.options].map((option) => option.value);
      if (names.join("\n") !== data.metrics.join("\n")) {
        const before = metric.value;
        metric.replaceChildren(...data.metrics.map((name) => element("option", { value: name }, name)));
        metric.value = data.metrics.includes(before) ? before : (data.metrics[0] ?? "");
      }
      for (const run of colours.keys()) if (!runs.has(run)) colours.delete(run);
      for (const row of rows) {
        const colour = colours.get(row.dataset.run);
        if (colour !== undefined) row.querySelector(".mark").className = `mark c${colour % NUM_COLOURS}`;
        row.querySelector("input").checked = colour !== undefined;
        row.querySelector("input").addEventListener("change", (event) => {
          select(row, event.target.checked);
          draw();
        });
      }
      rows.filter((row) => !known.has(row.dataset.run) && recorded(row.dataset.run))
        .slice(0, Math.max(0, NUM_COLOURS - colours.size))
        .forEach((row) => select(row, true));
      const sorted = table.tHead.querySelector("th[aria-sort]");
      if (next) sort(sorted, sorted.getAttribute("aria-sort") === "descending");
      if (next) sift();
      draw();
    };
    take(null);
    return take;
  }

  let take = null;
  if (data.page === "run") {
    drawPanels();
    sayAge();
    setInterval(sayAge, 1000);
    if (data.version) take = takeRun;
    else if (data.running) follow();
  } else if (data.page === "index") {
    take = compareRuns();
  }
  if (data.version) watch(take);
})();
