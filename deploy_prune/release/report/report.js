"use strict";
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const PALETTE = ["#0b7a75", "#d1495b", "#edae49", "#3d6fb6", "#8b5fbf", "#5a9e3f", "#c26a2d", "#2a9dbb", "#b0578d", "#7a7f1f"];
  const KIND = { head: "heads", qk: "query/key dimensions", vo: "value dimensions", neuron: "neurons" };
  const small = D.members.slice(1);
  const color = (name) => name === D.members[0].name ? "var(--dense)" : PALETTE[small.findIndex((m) => m.name === name) % PALETTE.length];
  const num = (x, digits = 4) => x === null || x === undefined ? "–" : Number(x.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 6 });
  const short = (x) => { for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (Math.abs(x) >= size) return num(x / size, 3) + " " + unit; return num(x, 3); };
  const bytes = (x) => x >= 1e9 ? num(x / 1e9, 3) + " GB" : x >= 1e6 ? num(x / 1e6, 3) + " MB" : num(x / 1e3, 3) + " kB";
  const pct = (x) => x === null || x === undefined ? "–" : num(100 * x, 3) + " %";

  function el(tag, attributes = {}, ...children) {
    const svg = ["svg", "g", "path", "line", "circle", "rect", "text"].includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) node.setAttribute(key, value);
    for (const child of children.flat()) if (child !== null) node.append(child);
    return node;
  }

  // ---- one tip for all charts, by pointer and by keyboard
  const tip = $("tip");
  function show(text, x, y) {
    tip.textContent = text; tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(innerWidth - box.width - 8, x + 14)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18) + "px";
  }
  const hide = () => { tip.hidden = true; };
  function says(node, text) {
    node.setAttribute("tabindex", "0"); node.setAttribute("role", "img"); node.setAttribute("aria-label", text.replace(/\n/g, ", "));
    node.addEventListener("pointermove", (e) => show(text, e.clientX, e.clientY));
    node.addEventListener("pointerleave", hide);
    node.addEventListener("focus", () => { const r = node.getBoundingClientRect(); show(text, r.right, r.top); });
    node.addEventListener("blur", hide);
    return node;
  }
  addEventListener("keydown", (e) => { if (e.key === "Escape") hide(); });

  function options(select, pairs, changed) {
    select.replaceChildren(...pairs.map(([value, text]) => el("option", { value }, text)));
    select.addEventListener("change", changed);
  }

  // ---- tables whose headings sort
  function table(node, columns, rows) {
    const head = el("tr"), body = el("tbody");
    const lines = rows.map((row) => {
      const line = el("tr", { class: row.dense ? "dense" : null }, columns.map((column) => {
        const cell = column.cell(row), td = el("td", { class: column.number ? "n" : null });
        td.append(...(Array.isArray(cell) ? cell : [cell]));
        return td;
      }));
      return { line, row };
    });
    columns.forEach((column) => {
      const button = el("button", { type: "button" }, column.name);
      const th = el("th", { scope: "col", class: column.number ? "n" : null, "aria-sort": "none" }, button);
      button.addEventListener("click", () => {
        const up = th.getAttribute("aria-sort") !== "ascending";
        for (const other of head.children) other.setAttribute("aria-sort", "none");
        th.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = ({ row }) => column.value(row);
        lines.sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === null || y === null) return (x === null) - (y === null);
          return (typeof x === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true })) * (up ? 1 : -1);
        });
        body.append(...lines.map((l) => l.line));
      });
      head.append(th);
    });
    body.append(...lines.map((l) => l.line));
    node.replaceChildren(el("thead", {}, head), body);
  }
  const cellOf = (member, name) => member.latency.find((l) => l.cell === name) || null;
  const note = (text) => el("small", {}, text);

  function family() {
    const columns = [
      { name: "member", cell: (m) => m.name, value: (m) => m.name },
      { name: "asked", cell: (m) => m.asked || "–", value: (m) => m.asked || "" },
      { name: "parameters", number: true, cell: (m) => m.params === null ? "–" : [short(m.params) + " ", note(pct(m.params_share))], value: (m) => m.params },
      { name: "MACs", number: true, cell: (m) => m.macs === null ? "–" : [short(m.macs) + " ", note(pct(m.macs_share))], value: (m) => m.macs },
      { name: "file", number: true, cell: (m) => bytes(m.bytes), value: (m) => m.bytes },
    ];
    if (D.metric) {
      columns.push({ name: D.metric, number: true, cell: (m) => m.quality ? [num(m.quality.value) + " ", note(`[${num(m.quality.low, 3)}, ${num(m.quality.high, 3)}]`)] : "–", value: (m) => m.quality ? m.quality.value : null });
      columns.push({ name: "lost", number: true, cell: (m) => m.dense || !m.drop ? "–" : [num(m.drop.value, 3) + " ", note(`[${num(m.drop.low, 2)}, ${num(m.drop.high, 2)}]`)], value: (m) => m.drop ? m.drop.value : null });
    }
    for (const name of D.cells) {
      columns.push({ name: `${name}, ms`, number: true, cell: (m) => { const c = cellOf(m, name); return c ? num(c.p50, 3) : "–"; }, value: (m) => (cellOf(m, name) || { p50: null }).p50 });
      columns.push({ name: "time / dense", number: true, value: (m) => (cellOf(m, name) || { ratio: null }).ratio, cell: (m) => {
        const c = cellOf(m, name);
        if (!c || m.dense) return "–";
        const mark = !c.trusted ? "self-check failed" : c.verdict;
        return [el("span", { class: mark === "faster" ? "good" : mark === "slower" || !c.trusted ? "bad" : null }, num(c.ratio, 3)), " ", note(`[${num(c.low, 2)}, ${num(c.high, 2)}]`), note(mark)];
      } });
    }
    table($("family-table"), columns, D.members.map((m, i) => ({ ...m, dense: i === 0 })));
  }

  // ---- axes
  function ticks(low, high, count) {
    const span = high - low || Math.abs(high) || 1, raw = span / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= raw);
    const found = [];
    for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) found.push(Math.abs(t) < step * 1e-9 ? 0 : t);
    return found;
  }
  function frame(holder, height, title) {
    const width = Math.max(280, holder.clientWidth);
    const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": title });
    holder.replaceChildren(svg);
    return { svg, width, height, left: 56, right: 18, top: 14, bottom: 44 };
  }
  function axes(f, x, y, xName, yName, xFormat, yFormat) {
    const inner = f.width - f.left - f.right;
    for (const t of ticks(y.low, y.high, 5)) f.svg.append(el("line", { x1: f.left, x2: f.width - f.right, y1: y.at(t), y2: y.at(t), stroke: "var(--grid)" }), el("text", { x: f.left - 8, y: y.at(t) + 4, "text-anchor": "end" }, yFormat(t)));
    for (const t of ticks(x.low, x.high, Math.max(3, Math.floor(inner / 90)))) f.svg.append(el("line", { x1: x.at(t), x2: x.at(t), y1: f.top, y2: f.height - f.bottom, stroke: "var(--grid)" }), el("text", { x: x.at(t), y: f.height - f.bottom + 18, "text-anchor": "middle" }, xFormat(t)));
    f.svg.append(el("text", { x: f.left + inner / 2, y: f.height - 6, "text-anchor": "middle", class: "name" }, xName), el("text", { x: 4, y: f.top - 2, class: "name" }, yName));
  }
  const scale = (low, high, from, to) => ({ low, high, at: (v) => from + (v - low) / (high - low || 1) * (to - from) });

  // ---- quality against cost
  const costs = [
    ...D.cells.map((name) => [`cell:${name}`, `latency, ${name} (ms)`, (m) => (cellOf(m, name) || { p50: null }).p50, (v) => num(v, 3)]),
    ["bytes", "file size", (m) => m.bytes, bytes],
    ["params", "parameters", (m) => m.params, short],
    ["macs", "MACs", (m) => m.macs, short],
  ].filter((c) => D.members.some((m) => c[2](m) !== null));
  const shown = new Set(D.members.map((m) => m.name));
  function pareto() {
    const holder = $("pareto-chart"), [key, name, of, format] = costs.find((c) => c[0] === $("cost").value) || costs[0];
    const points = D.members.filter((m) => shown.has(m.name) && m.quality && of(m) !== null);
    const f = frame(holder, Math.min(440, Math.max(300, holder.clientWidth * 0.5)), `${D.metric || "quality"} against ${name}`);
    if (!points.length) { holder.replaceChildren(el("p", { class: "hint" }, D.metric ? "No member is shown." : "No member was judged on data.")); $("pareto-hint").textContent = ""; return; }
    f.top = 26;
    const xs = points.map(of), ys = points.flatMap((m) => [m.quality.low, m.quality.high]);
    const padX = (Math.max(...xs) - Math.min(...xs)) * 0.08 || Math.abs(xs[0]) * 0.1 || 1, padY = (Math.max(...ys) - Math.min(...ys)) * 0.08 || 0.01;
    const x = scale(Math.max(0, Math.min(...xs) - padX), Math.max(...xs) + padX, f.left, f.width - f.right);
    const y = scale(Math.min(...ys) - padY, Math.max(...ys) + padY, f.height - f.bottom, f.top);
    axes(f, x, y, name, D.metric, format, (v) => num(v, 3));
    const better = D.higher_is_better ? 1 : -1;
    const best = points.filter((m) => !points.some((o) => of(o) <= of(m) && better * (o.quality.value - m.quality.value) >= 0 && (of(o) < of(m) || better * (o.quality.value - m.quality.value) > 0))).sort((a, b) => of(a) - of(b));
    f.svg.append(el("path", { d: best.map((m, i) => `${i ? "L" : "M"}${x.at(of(m))} ${y.at(m.quality.value)}`).join(""), fill: "none", stroke: "var(--accent)", "stroke-width": 2, "stroke-dasharray": "5 4", opacity: 0.7 }));
    const labels = [];
    for (const m of points) {
      const [cx, cy] = [x.at(of(m)), y.at(m.quality.value)], paint = color(m.name);
      const lines = [`${m.name}${m.asked ? " (" + m.asked + ")" : ""}`, `${D.metric} ${num(m.quality.value)} [${num(m.quality.low)}, ${num(m.quality.high)}], n=${m.quality.n}`, `${name} ${format(of(m))}`];
      if (key.startsWith("cell:") && m !== D.members[0]) { const c = cellOf(m, key.slice(5)); lines.push(`time / dense ${num(c.ratio, 3)} [${num(c.low, 3)}, ${num(c.high, 3)}]`, `${c.trusted ? c.verdict : "self-check failed"} on ${c.device || "an unnamed device"}`); }
      f.svg.append(el("line", { x1: cx, x2: cx, y1: y.at(m.quality.low), y2: y.at(m.quality.high), stroke: paint, "stroke-width": 1.5, opacity: 0.55 }));
      f.svg.append(says(el("circle", { cx, cy, r: 7, fill: paint, stroke: "var(--card)", "stroke-width": 2 }), lines.join("\n")));
      const wide = 7.5 * m.name.length + 4, end = cx + 10 + wide > f.width, from = end ? cx - 10 - wide : cx + 10;
      if (labels.some(([a, b, c]) => from < b && a < from + wide && Math.abs(c - cy) < 16)) continue; // the tip still names it
      labels.push([from, from + wide, cy]);
      f.svg.append(el("text", { x: cx + (end ? -10 : 10), y: cy - 8, class: "name", "text-anchor": end ? "end" : "start" }, m.name));
    }
    $("pareto-hint").textContent = "Bars are 95 % intervals of the figure itself; the dashed line joins the members that no other beats on both axes.";
  }
  function filter() {
    $("filter").replaceChildren(...D.members.map((m) => {
      const pill = el("button", { type: "button", class: "pill", "aria-pressed": "true" }, el("span", { class: "dot", style: `background:${color(m.name)}` }), m.name);
      pill.addEventListener("click", () => { shown.has(m.name) ? shown.delete(m.name) : shown.add(m.name); pill.setAttribute("aria-pressed", shown.has(m.name)); pareto(); });
      return pill;
    }));
  }

  // ---- the path, a row per layer
  const RAMP = [[20, 24, 60], [62, 40, 120], [40, 100, 142], [38, 150, 138], [100, 190, 100], [236, 220, 80]];
  const shade = (v) => { const p = Math.max(0, Math.min(1, v)) * (RAMP.length - 1), i = Math.min(RAMP.length - 2, Math.floor(p)), t = p - i; return RAMP[i].map((c, k) => Math.round(c + (RAMP[i + 1][k] - c) * t)); };
  function heat() {
    const holder = $("path-chart"), rows = D.path[$("path-kind").value] || [];
    if (!rows.length) { holder.replaceChildren(el("p", { class: "hint" }, "The bundle holds no path.")); return; }
    const width = Math.max(280, holder.clientWidth), label = Math.min(150, width * 0.32), rowHeight = Math.max(10, Math.min(24, 520 / rows.length)), height = rows.length * rowHeight;
    const ratio = devicePixelRatio || 1, canvas = el("canvas", { width: width * ratio, height: (height + 26) * ratio, tabindex: "0", role: "img", "aria-label": `When ${KIND[$("path-kind").value]} leave, ${rows.length} layers. Arrow keys read the cells.` });
    canvas.style.height = height + 26 + "px";
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    pen.scale(ratio, ratio); pen.font = "11px system-ui, sans-serif"; pen.textBaseline = "middle";
    const cell = (row) => (width - label) / row.values.length;
    rows.forEach((row, i) => {
      row.values.forEach((v, j) => { pen.fillStyle = `rgb(${shade(v).join()})`; pen.fillRect(label + j * cell(row), i * rowHeight, Math.ceil(cell(row)) + 0.4, rowHeight - 1); });
      pen.fillStyle = style.getPropertyValue("--soft");
      let text = row.site; while (pen.measureText(text).width > label - 8 && text.length > 4) text = "…" + text.slice(2);
      pen.textAlign = "right"; pen.fillText(text, label - 6, i * rowHeight + rowHeight / 2);
    });
    for (let k = 0; k <= 120; k++) { pen.fillStyle = `rgb(${shade(k / 120).join()})`; pen.fillRect(label + k, height + 10, 1.5, 10); }
    pen.fillStyle = style.getPropertyValue("--soft"); pen.textAlign = "right"; pen.fillText("leaves first", label - 6, height + 15); pen.textAlign = "left"; pen.fillText("leaves last", label + 128, height + 15);
    const words = (i, j) => { const row = rows[i], per = row.units / row.values.length; return `${row.site}, ${per > 1 ? `units ${Math.floor(j * per) + 1}–${Math.floor((j + 1) * per)}` : `unit ${j + 1}`} of ${row.units}: leaves at ${pct(row.values[j])} of the way`; };
    let at = [0, 0];
    const read = () => { $("path-says").textContent = words(...at); };
    canvas.addEventListener("pointermove", (e) => {
      const box = canvas.getBoundingClientRect(), i = Math.floor((e.clientY - box.top) / rowHeight), px = e.clientX - box.left - label;
      if (i < 0 || i >= rows.length || px < 0) { hide(); return; }
      at = [i, Math.min(rows[i].values.length - 1, Math.floor(px / cell(rows[i])))]; read(); show(words(...at), e.clientX, e.clientY);
    });
    canvas.addEventListener("pointerleave", hide);
    canvas.addEventListener("focus", read);
    canvas.addEventListener("keydown", (e) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
      if (!move) return;
      e.preventDefault();
      const i = Math.max(0, Math.min(rows.length - 1, at[0] + move[0]));
      at = [i, Math.max(0, Math.min(rows[i].values.length - 1, at[1] + move[1]))]; read();
    });
    holder.replaceChildren(canvas);
  }

  // ---- widths
  function widths() {
    const holder = $("width-chart"), w = D.widths[$("width-kind").value];
    const names = w ? Object.keys(w.kept) : [];
    if (!names.length) { holder.replaceChildren(el("p", { class: "hint" }, "The bundle holds no plans.")); return; }
    const f = frame(holder, 320, `Share of ${KIND[$("width-kind").value]} kept per layer`), n = w.sites.length;
    f.top = 26;
    const x = scale(0, Math.max(1, n - 1), f.left + 8, f.width - f.right - 8), y = scale(0, 1, f.height - f.bottom, f.top);
    for (const t of [0, 0.25, 0.5, 0.75, 1]) f.svg.append(el("line", { x1: f.left, x2: f.width - f.right, y1: y.at(t), y2: y.at(t), stroke: "var(--grid)" }), el("text", { x: f.left - 8, y: y.at(t) + 4, "text-anchor": "end" }, pct(t)));
    const every = Math.ceil(n / Math.max(2, Math.floor((f.width - f.left) / 46)));
    w.sites.forEach((site, i) => { if (i % every === 0) f.svg.append(el("text", { x: x.at(i), y: f.height - f.bottom + 18, "text-anchor": "middle" }, String(i))); });
    f.svg.append(el("text", { x: (f.left + f.width) / 2, y: f.height - 6, "text-anchor": "middle", class: "name" }, "layer"), el("text", { x: 4, y: f.top - 12, class: "name" }, "kept"));
    for (const name of names) {
      const own = w.kept[name], share = own.map((k, i) => k === null ? null : k / w.total[i]);
      f.svg.append(el("path", { d: share.map((s, i) => s === null ? "" : `${i && share[i - 1] !== null ? "L" : "M"}${x.at(i)} ${y.at(s)}`).join(""), fill: "none", stroke: color(name), "stroke-width": 2.2, "stroke-linejoin": "round" }));
      share.forEach((s, i) => { if (s !== null) f.svg.append(says(el("circle", { cx: x.at(i), cy: y.at(s), r: n > 40 ? 3 : 4.5, fill: color(name) }), `${name}, ${w.sites[i]}\nkeeps ${own[i]} of ${w.total[i]} ${KIND[$("width-kind").value]} (${pct(s)})`)); });
    }
    $("width-legend").replaceChildren(...names.map((name) => el("span", { class: "legend" }, el("span", { class: "dot", style: `background:${color(name)};align-self:center` }), name)));
  }

  // ---- proof
  function proof() {
    const rows = D.members.flatMap((m) => m.parity.map((p) => ({ ...p, member: m.name })));
    table($("parity-table"), [
      { name: "member", cell: (r) => r.member, value: (r) => r.member },
      { name: "forms", cell: (r) => `${r.reference} = ${r.candidate}`, value: (r) => r.candidate },
      { name: "largest difference", number: true, cell: (r) => r.error === null ? "–" : r.error.toExponential(1), value: (r) => r.error },
      { name: "tolerance", number: true, cell: (r) => r.tolerance === null ? "–" : r.tolerance.toExponential(0), value: (r) => r.tolerance },
      { name: "same argmax", number: true, cell: (r) => pct(r.agreement), value: (r) => r.agreement },
      { name: "", cell: (r) => r.error <= r.tolerance ? el("span", { class: "good" }, "equal") : el("span", { class: "bad" }, "not equal"), value: (r) => r.error <= r.tolerance ? 0 : 1 },
    ], rows);
    const audited = D.members.filter((m) => m.audit);
    $("audit").replaceChildren(audited.length
      ? el("div", {}, el("h3", {}, "Audit of the graphs"), audited.map((m) => el("details", {}, el("summary", {}, m.name), el("pre", {}, JSON.stringify(m.audit, null, 2)))))
      : el("p", { class: "hint" }, "No graph was audited."));
  }

  // ---- loading
  let language = "Python";
  function load() {
    const name = $("load-member").value, m = D.members.find((o) => o.name === name);
    $("load-code").textContent = D.loading[language].replaceAll("MEMBER", name);
    $("load-file").textContent = `${m.file}, ${bytes(m.bytes)}, sha256 ${m.sha256}`;
    $("load-code").setAttribute("aria-label", `${language} code`);
    for (const tab of $("load-tabs").children) { const on = tab.textContent === language; tab.setAttribute("aria-selected", on); tab.tabIndex = on ? 0 : -1; }
  }
  function tabs() {
    const names = ["Python", "C++", "Triton"];
    $("load-tabs").replaceChildren(...names.map((name, i) => {
      const tab = el("button", { type: "button", role: "tab", "aria-controls": "load-code" }, name);
      tab.addEventListener("click", () => { language = name; load(); });
      tab.addEventListener("keydown", (e) => { const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key]; if (step) { language = names[(i + step + names.length) % names.length]; load(); $("load-tabs").children[names.indexOf(language)].focus(); } });
      return tab;
    }));
  }

  function environment() {
    const rows = [...Object.entries(D.environment), ["task", D.task], ["evaluation data", D.evaluation], ...Object.entries(D.versions)];
    $("environment-table").replaceChildren(el("tbody", {}, rows.filter((r) => r[1]).map(([k, v]) => el("tr", {}, el("th", { scope: "row" }, k), el("td", {}, String(v))))));
  }

  function head() {
    $("title").textContent = D.name;
    $("lead").textContent = `${small.length} compact ONNX models cut from ${D.model} by one search. Task: ${D.task || "unknown"}.`;
    const least = [...small].sort((a, b) => a.bytes - b.bytes)[0], tiles = [["dense parameters", short(D.parameters)]];
    const dense = D.members[0];
    if (dense.quality) tiles.push([`dense ${D.metric}, n=${dense.quality.n}`, num(dense.quality.value)]);
    if (least && least.quality) tiles.push([`${D.metric} of ${least.name}, ${pct(least.bytes_share)} of the bytes`, num(least.quality.value)]);
    const fast = small.flatMap((m) => m.latency.filter((l) => l.trusted).map((l) => [m, l])).sort((a, b) => a[1].ratio - b[1].ratio)[0];
    if (fast) tiles.push([`faster than dense: ${fast[0].name}, ${fast[1].cell}`, num(1 / fast[1].ratio, 3) + "×"]);
    $("tiles").replaceChildren(...tiles.map(([name, value]) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, name))));
  }

  $("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark"; draw();
  });
  const draw = () => { pareto(); heat(); widths(); };
  head(); family(); proof(); tabs(); environment(); filter();
  options($("cost"), costs.map((c) => [c[0], c[1]]), pareto);
  options($("path-kind"), Object.keys(D.path).map((k) => [k, KIND[k] || k]), heat);
  options($("width-kind"), Object.keys(D.widths).map((k) => [k, KIND[k] || k]), widths);
  if (D.widths.neuron) { $("path-kind").value = "neuron"; $("width-kind").value = "neuron"; }
  options($("load-member"), D.members.map((m) => [m.name, m.name]), load);
  $("load-member").value = (small[0] || D.members[0]).name;
  load(); draw();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
