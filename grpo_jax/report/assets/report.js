// Draws the report. Text of runs is only ever written by textContent.
"use strict";
(() => {
  const COLORS = ["#2f7fc1", "#d9534f", "#2e9e62", "#b8860b", "#8a63d2", "#0f8b8d", "#c2571a", "#7f7f7f"];
  const FIRST = [
    "eval/accuracy", "reward", "accuracy", "entropy", "completions/mean_length",
    "completions/clipped_ratio", "frac_reward_zero_std", "grad_norm", "kl",
    "sampling/sampling_logp_difference/mean", "step_time",
  ];
  const POLL = 5000; // milliseconds between questions of a live page
  const GROUPS = 6, ROWS = 100, FILES = 8; // shown before somebody asks for more
  const TOKENS = 1500, LETTERS = 6000; // of a completion, likewise
  let data = { runs: [] };
  let tag = null; // of the data of a live page
  const parts = new Map();
  const $ = (id) => document.getElementById(id);

  // --- elements ---------------------------------------------------------------------------------

  function el(name, properties = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key in node) node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }
  const row = (cells, name = "td") => el("tr", {}, ...cells.map((c) =>
    c instanceof Node && c.nodeName.startsWith("T") ? c : el(name, {}, c)));
  const show = (x, digits = 3) =>
    x === null || x === undefined || Number.isNaN(x) ? "–"
    : typeof x !== "number" ? String(x)
    : Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 10 ** -digits) ? x.toExponential(1)
    : String(+x.toFixed(digits));
  const mean = (xs) => xs.reduce((a, b) => a + b, 0) / xs.length;
  const error = (xs) => {
    const m = mean(xs);
    return Math.sqrt(xs.reduce((a, x) => a + (x - m) ** 2, 0) / Math.max(xs.length - 1, 1) / xs.length);
  };
  // Characters that turn or hide text are shown by their number.
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/gu;
  const visible = (text) => String(text).replace(HIDDEN, (c) =>
    "⟨" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
  const seconds = (s) => s < 120 ? `${show(s, 1)} s` : s < 7200 ? `${show(s / 60, 1)} min` : `${show(s / 3600, 1)} h`;
  const colorOf = (i) => COLORS[i % COLORS.length];

  // --- data -------------------------------------------------------------------------------------

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }
  async function load(run, file) {
    const about = data.runs[run].files[file];
    const key = `${run}/${about.name}/${data.live ? about.shown : ""}`;
    if (!parts.has(key)) {
      if (parts.size > 60) parts.delete(parts.keys().next().value);
      parts.set(key, data.live
        ? fetch(`/part?run=${run}&file=${encodeURIComponent(about.name)}`).then((r) => r.json())
        : unpack($(`part-${run}-${file}`).textContent));
    }
    return parts.get(key);
  }
  async function poll() {
    try {
      const answer = await fetch("/data", tag ? { headers: { "If-None-Match": tag } } : {});
      const found = answer.headers.get("ETag");
      if (answer.status === 200 && found !== tag) {
        const first = tag === null;
        tag = found;
        data = await answer.json();
        refresh(first);
      }
      $("status").textContent = answer.status === 503 ? (await answer.json()).error : "live";
    } catch {
      $("status").textContent = "The server has ended; this is what it showed last.";
    }
    setTimeout(poll, POLL);
  }

  // --- tabs -------------------------------------------------------------------------------------

  const TABS = { overview, curves, completions, compare, config };
  let current = "overview";
  function open(name, focus = false) {
    current = name in TABS ? name : "overview";
    for (const tab of Object.keys(TABS)) {
      $(tab).hidden = tab !== current;
      $(`tab-${tab}`).setAttribute("aria-selected", String(tab === current));
      $(`tab-${tab}`).tabIndex = tab === current ? 0 : -1;
    }
    if (focus) $(`tab-${current}`).focus();
    if (location.hash !== `#${current}`) history.replaceState(null, "", `#${current}`);
    hideTip();
    TABS[current]();
  }
  function refresh(first) {
    const names = data.runs.map((run) => run.name).join(", ");
    $("title").textContent = names;
    document.title = `${names}: report`;
    fillChoices();
    // What somebody reads stays as it is; its controls know of the new steps.
    if (first || !["completions", "compare"].includes(current)) open(first ? location.hash.slice(1) : current);
    else if (current === "completions") $("sample-slider").max = Math.max(filesOf(chosen().run, chosen().kind).length - 1, 0);
    document.documentElement.dataset.ready = "yes";
  }

  // --- overview ---------------------------------------------------------------------------------

  function lastOf(run, name) {
    const found = run.metrics[name];
    return found ? found[1][found[1].length - 1] : null;
  }
  function overview() {
    $("overview").replaceChildren(...data.runs.map((run, i) => {
      const steps = run.metrics.reward ? run.metrics.reward[0] : [];
      const done = steps.length ? steps[steps.length - 1] + 1 : 0;
      const accuracy = lastOf(run, "eval/accuracy"), spread = lastOf(run, "eval/accuracy_se");
      const before = run.metrics["eval/accuracy"] ? run.metrics["eval/accuracy"][1][0] : null;
      const facts = [
        ["model", run.config["model.source"]],
        ["task", [run.config["task.name"], run.config["task.settings.dataset"]].filter(Boolean).join(": ")],
        ["algorithm", run.config["algorithm.name"]],
        ["steps", run.steps ? `${done} of ${run.steps}` : String(done)],
        ["held-out accuracy", accuracy === null ? null
          : `${show(before)} → ${show(accuracy)}${spread === null ? "" : ` ± ${show(spread)}`}`],
        ["reward in the last steps", steps.length ? show(mean(run.metrics.reward[1].slice(-10))) : null],
        ["tokens", lastOf(run, "num_tokens")?.toLocaleString("en")],
        ["devices", run.provenance.devices],
        ["peak memory", memoryOf(run)],
        ["memory of a device", partsOf(run)],
        ["last session", run.provenance.start
          ? `${run.provenance.start}, ${run.provenance.reason ?? "goes on, or was killed"}` : null],
        ["code", run.provenance.commit ? run.provenance.commit.slice(0, 12) : null],
      ].filter(([, value]) => value);
      return el("article", { className: "run" },
        el("h2", {}, swatch(i), visible(run.name)),
        el("dl", {}, ...facts.flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, visible(v))])),
        timeOf(run),
        el("h3", {}, "Findings"),
        ...(run.findings.length ? run.findings.map(finding) : [el("p", {}, "The doctor finds nothing.")]),
        ...run.problems.map((text) => el("p", { className: "problem" }, visible(text))),
        ...damage(run));
    }));
  }
  const damage = (run) => {
    const lines = run.files.reduce((n, file) => n + file.damaged, 0);
    return lines ? [el("p", { className: "problem" },
      `${lines} lines of samples are damaged and not shown`)] : [];
  };
  function memoryOf(run) {
    const names = [["host", "memory_host"], ["device", "memory_device"]];
    return names.filter(([, k]) => run.provenance[k])
      .map(([name, k]) => `${show(run.provenance[k] / 2 ** 30, 1)} GiB (${name})`).join(", ") || null;
  }
  const partsOf = (run) => Object.entries(run.provenance).filter(([k]) => k.startsWith("memory/"))
    .map(([k, n]) => `${k.slice(7)} ${show(n / 2 ** 30, 2)} GiB`).join(", ") || null;
  function timeOf(run) {
    // The first step compiles.
    const sum = (name) => (run.metrics[name]?.[1] ?? []).slice(1).reduce((a, b) => a + b, 0);
    const total = sum("step_time");
    if (!total || !run.metrics["time/sampling"]) return null;
    const sampling = sum("time/sampling"), rewards = sum("time/rewards");
    const shares = [["sampling", sampling], ["rewards", rewards], ["update and the rest", total - sampling - rewards]];
    const bar = el("div", { className: "bar", role: "img",
      "aria-label": shares.map(([name, s]) => `${name} ${seconds(s)}`).join(", ") });
    for (const [i, [name, s]] of shares.entries()) {
      const piece = el("span", { title: `${name}: ${seconds(s)}` });
      piece.style.flexGrow = String(Math.max(s, 0) / total);
      piece.style.background = colorOf(i);
      bar.append(piece);
    }
    return el("div", {}, el("h3", {}, `Time of the steps after the first: ${seconds(total)}`), bar,
      el("p", { className: "key" }, ...shares.map(([name, s], i) =>
        el("span", {}, swatch(i), `${name} ${seconds(s)} (${Math.round(100 * s / total)} %) `))));
  }
  const finding = (f) => el("article", { className: `finding ${f.confidence}` },
    el("h4", {}, `${f.name} `, el("span", { className: "badge" }, f.confidence)),
    el("p", {}, `Since step ${f.since}: ${visible(f.seen)}.`),
    el("p", {}, el("b", {}, "Why: "), visible(f.reason)),
    el("p", {}, el("b", {}, "Next: "), visible(f.advice)));
  function swatch(i) {
    const mark = el("span", { className: "swatch" });
    mark.style.background = colorOf(i);
    return mark;
  }

  // --- curves -----------------------------------------------------------------------------------

  let charts = [];
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && entry.target.draw) {
      entry.target.draw();
      entry.target.draw = null;
    }
  }, { rootMargin: "300px" });
  new ResizeObserver(() => {
    for (const { plot, box } of charts) {
      if (box.clientWidth && Math.abs(box.clientWidth - plot.width) > 2) plot.setSize({ width: box.clientWidth, height: 230 });
    }
  }).observe($("charts"));

  function lines() {
    // Runs that differ in their seed alone are one line, if asked for.
    const bySeed = $("by-seed").checked, found = new Map();
    data.runs.forEach((run, i) => {
      const key = bySeed && run.config.seed !== undefined ? run.seedless : `run ${i}`;
      if (!found.has(key)) found.set(key, []);
      found.get(key).push(i);
    });
    return [...found.values()].map((runs, i) => ({
      runs, color: colorOf(i),
      name: runs.map((r) => data.runs[r].name).join(", "),
    }));
  }
  function smooth(xs, ys, width) {
    if (!width) return ys;
    return ys.map((_, i) => {
      const near = ys.slice(Math.max(i - width, 0), i + width + 1).filter((y) => y !== null);
      return ys[i] === null || !near.length ? null : mean(near);
    });
  }
  function metricNames() {
    const words = $("metric-filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = new Set(data.runs.flatMap((run) => Object.keys(run.metrics)));
    const names = [...all].filter((name) => !name.endsWith("_se") && name !== "eval/n").sort();
    if (words.length) return names.filter((name) => words.every((w) => name.toLowerCase().includes(w)));
    const rewards = names.filter((name) => /^rewards\/.+\/mean$/.test(name));
    return [...FIRST.filter((name) => all.has(name)), ...(rewards.length > 1 ? rewards : [])];
  }
  function curves() {
    for (const { plot } of charts) plot.destroy();
    charts = [];
    seen.disconnect();
    const width = Number($("smoothing").value), groups = lines(), names = metricNames();
    $("smoothing-value").textContent = width ? `${2 * width + 1} steps` : "1 step";
    $("legend").replaceChildren(...groups.map((g) => {
      const mark = swatch(0);
      mark.style.background = g.color;
      return el("span", { className: "key" }, mark, visible(g.name));
    }));
    $("charts").replaceChildren(...names.map((name) => {
      const box = el("figure", { className: "chart" }, el("figcaption", {}, visible(name)));
      box.draw = () => draw(box, name, groups, width);
      seen.observe(box);
      return box;
    }));
    if (!names.length) $("charts").replaceChildren(el("p", {}, "No metric has such a name."));
  }
  function draw(box, name, groups, width) {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim(), grid = style.getPropertyValue("--line").trim();
    const steps = [...new Set(data.runs.flatMap((run) => run.metrics[name]?.[0] ?? []))].sort((a, b) => a - b);
    const at = new Map(steps.map((s, i) => [s, i]));
    const column = (run, metric) => {
      const values = new Array(steps.length).fill(null), found = data.runs[run].metrics[metric];
      found?.[0].forEach((s, i) => { if (at.has(s)) values[at.get(s)] = found[1][i]; });
      return values;
    };
    const isEvaluation = name.startsWith("eval/");
    const columns = [steps], series = [{ label: "step" }], bands = [], bars = [];
    for (const group of groups) {
      const each = group.runs.map((run) => column(run, name)).filter((c) => c.some((v) => v !== null));
      if (!each.length) continue;
      const over = (f) => steps.map((_, i) => {
        const values = each.map((c) => c[i]).filter((v) => v !== null);
        return values.length ? f(values) : null;
      });
      const middle = over(mean), w = isEvaluation ? 0 : width;
      if (w) {
        columns.push(middle);
        series.push({ label: "raw", stroke: "transparent", points: { show: true, size: 3, fill: group.color + "55", stroke: "transparent" } });
      }
      columns.push(smooth(steps, middle, w));
      series.push({
        label: visible(group.name), stroke: group.color, width: 1.8, spanGaps: true,
        value: (_, v) => show(v, 4), points: { show: isEvaluation || steps.length < 3, size: 6, fill: group.color },
      });
      const line = series.length - 1;
      if (each.length > 1) {
        for (const f of [(v) => Math.max(...v), (v) => Math.min(...v)]) {
          columns.push(smooth(steps, over(f), w));
          series.push({ label: "", stroke: "transparent", spanGaps: true, points: { show: false } });
        }
        bands.push({ series: [line + 1, line + 2], fill: group.color + "33" });
      } else if (isEvaluation) {
        bars.push({ line, color: group.color, errors: column(group.runs[0], `${name}_se`) });
      }
    }
    const marks = data.runs.flatMap((run, i) => run.findings.filter((f) => f.metric === name)
      .map((f) => ({ ...f, color: groups.find((g) => g.runs.includes(i)).color })));
    const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid }, font: "11px system-ui" };
    const plot = new uPlot({
      width: box.clientWidth || 320, height: 230, series, bands,
      legend: { show: false }, cursor: { sync: { key: "steps" }, drag: { x: true, y: false } },
      scales: { x: { time: false } },
      axes: [axis, { ...axis, size: 58, values: (_, ticks) => ticks.map((v) => show(v, 4)) }],
      hooks: { draw: [(u) => decorate(u, bars, marks, ink)], setCursor: [(u) => readout(u, box, series)] },
    }, columns, box);
    box.append(el("p", { className: "readout" }, lastLine(columns, series)));
    plot.root.setAttribute("role", "img");
    plot.root.setAttribute("aria-label", `${name}: ${lastLine(columns, series)}`);
    for (const mark of marks) {
      box.append(el("p", { className: "mark" }, `from step ${mark.since}: ${mark.name} (${mark.confidence})`));
    }
    charts.push({ plot, box });
  }
  const named = (series) => series.map((s, i) => [s, i]).filter(([s, i]) => i && s.label && s.label !== "raw");
  const lastLine = (columns, series) => named(series).map(([s, i]) => {
    const values = columns[i].filter((v) => v !== null);
    return `${data.runs.length > 1 ? s.label + " " : "last "}${show(values[values.length - 1], 4)}`;
  }).join(" · ");
  function readout(u, box, series) {
    const line = box.querySelector(".readout");
    if (!line) return;
    const i = u.cursor.idx;
    line.textContent = i === null || i === undefined ? lastLine(u.data, series)
      : `step ${u.data[0][i]}: ` + named(series).map(([s, k]) =>
        `${data.runs.length > 1 ? s.label + " " : ""}${show(u.data[k][i], 4)}`).join(" · ");
  }
  function decorate(u, bars, marks, ink) {
    const { ctx } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    ctx.clip();
    for (const { line, color, errors } of bars) {
      ctx.strokeStyle = color;
      ctx.lineWidth = 1.5 * devicePixelRatio;
      errors.forEach((e, i) => {
        const y = u.data[line][i];
        if (e === null || y === null) return;
        const x = u.valToPos(u.data[0][i], "x", true);
        ctx.beginPath();
        ctx.moveTo(x, u.valToPos(y - e, "y", true));
        ctx.lineTo(x, u.valToPos(y + e, "y", true));
        ctx.stroke();
      });
    }
    ctx.font = `${11 * devicePixelRatio}px system-ui`;
    marks.forEach((mark, i) => {
      const x = u.valToPos(mark.since, "x", true);
      ctx.strokeStyle = mark.color;
      ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(x, u.bbox.top);
      ctx.lineTo(x, u.bbox.top + u.bbox.height);
      ctx.stroke();
      ctx.setLineDash([]);
      ctx.fillStyle = ink;
      const right = x > u.bbox.left + 0.6 * u.bbox.width;
      ctx.textAlign = right ? "right" : "left";
      ctx.fillText(mark.name, x + (right ? -4 : 4), u.bbox.top + (12 + 13 * i) * devicePixelRatio);
    });
    ctx.restore();
  }

  // --- completions ------------------------------------------------------------------------------

  let following = null; // what tells one prompt apart, while it is shown through the steps
  let shown = GROUPS, ticket = 0;
  const filesOf = (run, kind) => data.runs[run].files.map((f, i) => ({ ...f, index: i })).filter((f) => f.kind === kind);
  const chosen = () => ({ run: Number($("sample-run").value) || 0, kind: $("sample-kind").value });

  function fillChoices() {
    const keep = $("sample-run").value;
    $("sample-run").replaceChildren(...data.runs.map((run, i) => el("option", { value: i }, visible(run.name))));
    if (keep) $("sample-run").value = keep;
    const evaluations = data.runs.flatMap((run, r) => filesOf(r, "eval").map((f) =>
      ({ value: `${r}/${f.index}`, text: `${run.name}, after ${f.step} steps`, run: r })));
    for (const [id, pick] of [["compare-a", first], ["compare-b", last]]) {
      const before = $(id).value;
      $(id).replaceChildren(...evaluations.map((e) => el("option", { value: e.value }, visible(e.text))));
      const known = evaluations.some((e) => e.value === before);
      if (evaluations.length) $(id).value = known ? before : pick(evaluations).value;
    }
  }
  // Of one run its first and last evaluation; of several the last ones of the first two.
  const first = (list) => data.runs.length === 1 ? list[0] : list.filter((e) => e.run === list[0].run).at(-1);
  const last = (list) => data.runs.length === 1 ? list.at(-1)
    : list.filter((e) => e.run === (list.find((e) => e.run !== list[0].run) ?? list[0]).run).at(-1);

  async function completions(keepPage = false) {
    if (!keepPage) shown = GROUPS;
    const mine = ++ticket, { run, kind } = chosen(), files = filesOf(run, kind);
    $("sample-slider").max = Math.max(files.length - 1, 0);
    $("sample-slider").disabled = following !== null;
    $("more").hidden = true;
    if (!files.length) {
      $("groups").replaceChildren();
      $("sample-step").textContent = "–";
      $("sample-status").textContent = kind === "eval" ? "This run has no evaluations." : "This run has no samples.";
      return;
    }
    if (following !== null) return follow(mine, run);
    const file = files[Number($("sample-slider").value)] ?? files[0];
    $("sample-step").textContent = String(file.step);
    const part = await load(run, file.index);
    if (mine !== ticket) return;
    const groups = part.groups.map(filtered).filter((g) => g.completions.length);
    const count = groups.reduce((n, g) => n + g.completions.length, 0);
    const rewards = groups.flatMap((g) => g.completions.map(scoreOf)).filter((r) => r !== null);
    const shade = $("sample-shade").value;
    const has = (f) => part.groups.some((g) => g.completions.some((c) => c.tokens && f(c.tokens)));
    $("sample-status").textContent = [
      `${groups.length} prompts, ${count} completions`,
      rewards.length ? `mean ${kind === "eval" ? "accuracy" : "reward"} ${show(mean(rewards))}` : null,
      part.groups.length < part.of ? `the file shows ${part.groups.length} of ${part.of} groups` : null,
      part.damaged ? `${part.damaged} damaged lines left out` : null,
      shade && !has(() => true) ? "this step has no tokens: log.tokens_every says which have"
        : shade === "ratio" && !has((t) => t.ratio) ? "this run has no ratios: log.ratios=true records them" : null,
    ].filter(Boolean).join(" · ");
    $("groups").replaceChildren(...groups.slice(0, shown).map((g) => groupView(g, kind, run)));
    $("more").hidden = groups.length <= shown;
    $("more").textContent = `More (${groups.length - shown} prompts left)`;
  }
  const scoreOf = (c) => c.reward ?? c.accuracy ?? null;
  function filtered(group) {
    const how = $("sample-filter").value, search = $("sample-search").value.toLowerCase(), by = $("sample-sort").value;
    let rows = group.completions.map((c, i) => ({ ...c, number: i }));
    const scores = rows.map(scoreOf);
    if (how === "mixed" && new Set(scores).size < 2) rows = [];
    if (how === "right") rows = rows.filter((c) => c.accuracy === 1);
    if (how === "wrong") rows = rows.filter((c) => c.accuracy !== 1);
    if (how === "cut") rows = rows.filter((c) => c.length === Math.max(...rows.map((r) => r.length ?? 0)));
    if (search) {
      rows = rows.filter((c) => JSON.stringify([group.prompt, c.completion, c.turns ?? ""]).toLowerCase()
        .includes(JSON.stringify(search).slice(1, -1)));
    }
    if (by) rows.sort((a, b) => (b[by] ?? -Infinity) - (a[by] ?? -Infinity));
    return { ...group, completions: rows, scores };
  }
  async function follow(mine, run) {
    const known = promptOf(run, following);
    const files = known ? known[2] : [];
    $("sample-status").replaceChildren(
      `One prompt in ${files.length} files of ${visible(data.runs[run].name)}: ${visible(known ? known[1] : "it is not in this run")} `,
      el("button", { type: "button", onclick: () => { following = null; completions(); } }, "Back to all prompts"));
    const nodes = [];
    for (const index of files.slice(0, Math.max(shown, FILES))) {
      const part = await load(run, index), file = data.runs[run].files[index];
      if (mine !== ticket) return;
      const group = part.groups.find((g) => g.id === following);
      if (!group) continue;
      const when = file.kind === "eval" ? `Evaluation after ${file.step} steps` : `Step ${file.step}`;
      nodes.push(el("h3", {}, when), groupView(filtered(group), file.kind, run, true));
    }
    $("groups").replaceChildren(...nodes);
    $("more").hidden = files.length <= Math.max(shown, FILES);
    $("more").textContent = `More (${files.length - Math.max(shown, FILES)} files left)`;
  }
  function promptOf(run, id) {
    const of = data.runs[run];
    of.byId ??= new Map(of.prompts.map((prompt) => [prompt[0], prompt]));
    return of.byId.get(id);
  }

  function groupView(group, kind, run, isFollowed = false) {
    const scores = (group.scores ?? []).filter((s) => s !== null);
    const equal = scores.length > 1 && new Set(scores).size === 1;
    const advantages = group.completions.map((c) => Math.abs(c.advantage ?? 0));
    const largest = Math.max(...advantages, 1e-9);
    const files = promptOf(run, group.id)?.[2] ?? [];
    return el("article", { className: "group" },
      isFollowed ? null : promptView(group),
      el("p", { className: "facts" },
        group.answer === undefined ? null : el("span", {}, `answer ${visible(JSON.stringify(group.answer))}`),
        scores.length ? el("span", {}, `mean ${show(mean(scores))} of ${scores.length}`) : null,
        equal && kind === "step" ? el("span", { className: "flag" }, "no variance: no gradient") : null,
        isFollowed || files.length < 2 ? null : el("button", { type: "button", onclick: () => {
          following = group.id;
          shown = FILES;
          completions(true);
          $("sample-status").scrollIntoView({ block: "nearest" });
        } }, `through ${files.length} steps`)),
      ...group.completions.map((c) => completionView(c, largest)));
  }
  function promptView(group) {
    const messages = typeof group.prompt === "string" ? [{ content: group.prompt }] : group.prompt;
    return el("div", { className: "prompt" }, ...messages.map((m) => messageView(m)));
  }
  function messageView(message) {
    const content = typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? "");
    const calls = message.tool_calls ? "\n" + JSON.stringify(message.tool_calls) : "";
    return el("div", { className: `message ${["user", "assistant", "system", "tool"].includes(message.role) ? message.role : ""}` },
      message.role ? el("span", { className: "role" }, visible(message.role)) : null,
      longText(content + calls));
  }
  function longText(text) {
    const node = el("span", { className: "text", dir: "auto" });
    const cut = text.length > LETTERS;
    node.append(visible(cut ? text.slice(0, LETTERS) : text));
    if (cut) {
      node.append(el("button", { type: "button", onclick: (e) => { e.target.remove(); node.textContent = visible(text); } },
        `… ${text.length - LETTERS} more characters`));
    }
    return node;
  }
  function completionView(c, largest) {
    const right = c.accuracy === 1;
    const facts = [
      c.reward === undefined ? null : `reward ${show(c.reward)}`,
      ...(Object.keys(c.rewards ?? {}).length > 1 ? Object.entries(c.rewards).map(([k, v]) => `${k} ${show(v)}`) : []),
      c.advantage === undefined || c.advantage === null ? null : `advantage ${show(c.advantage)}`,
      c.length === undefined ? null : `${c.length} tokens`,
      c.ended === false ? "cut off" : null,
    ].filter(Boolean);
    const mark = c.accuracy === undefined || c.accuracy === null ? null
      : el("span", { className: right ? "right" : "wrong", title: right ? "right" : "wrong" }, right ? "✓" : "✗");
    const shade = $("sample-shade").value;
    const body = c.turns && !(shade && c.tokens) ? el("div", {}, ...c.turns.map(messageView))
      : c.tokens && shade ? tokensView(c, shade, largest)
      : el("div", { className: "message" }, longText(String(c.completion ?? "")));
    return el("article", { className: "completion" },
      el("p", { className: "facts" }, mark, ...facts.map((f) => el("span", {}, visible(f)))), body);
  }
  // Alpha of the color of a token, from 0 to 1, and its color.
  const SHADES = {
    logp: (t, i) => t.logp[i] === null ? null : [Math.min(-t.logp[i] / 5, 1), "217, 83, 79"],
    entropy: (t, i) => t.entropy[i] === null ? null : [Math.min(t.entropy[i] / 3, 1), "138, 99, 210"],
    ratio: (t, i) => {
      const log = Math.log(t.ratio?.[i] ?? NaN);
      return Number.isNaN(log) ? null : [Math.min(Math.abs(log) / 0.5, 1), log > 0 ? "46, 158, 98" : "217, 83, 79"];
    },
    advantage: (t, i, c, largest) => {
      const a = t.advantage ? t.advantage[i] : t.logp[i] === null ? null : c.advantage;
      return a === null || a === undefined ? null : [Math.min(Math.abs(a) / largest, 1), a > 0 ? "46, 158, 98" : "217, 83, 79"];
    },
  };
  function tokensView(c, shade, largest) {
    const tokens = c.tokens, box = el("div", { className: "message tokens", tabIndex: 0, dir: "auto",
      "aria-label": "tokens; the arrow keys move from one to the next" });
    const span = (text, i) => {
      const node = el("span", { className: "token" }, text === "\n" ? "⏎\n" : visible(text));
      const color = SHADES[shade](tokens, i, c, largest);
      if (color) node.style.backgroundColor = `rgba(${color[1]}, ${(0.75 * color[0]).toFixed(2)})`;
      else if (tokens.logp[i] === null) node.classList.add("observed");
      node.number = i;
      return node;
    };
    const fill = (count) => box.replaceChildren(...tokens.text.slice(0, count).map(span));
    fill(TOKENS);
    if (tokens.text.length > TOKENS) {
      box.append(el("button", { type: "button", onclick: () => fill(tokens.text.length) },
        `… ${tokens.text.length - TOKENS} more tokens`));
    }
    const about = (i) => [
      `token ${i + 1} of ${tokens.text.length}: ${visible(JSON.stringify(tokens.text[i]))}`,
      tokens.logp[i] === null ? "written by the environment"
        : `log-prob ${show(tokens.logp[i], 4)} (probability ${show(Math.exp(tokens.logp[i]), 4)})`,
      tokens.entropy[i] === null ? null : `entropy ${show(tokens.entropy[i], 4)} nats`,
      tokens.logp[i] === null ? null : `advantage ${show(tokens.advantage ? tokens.advantage[i] : c.advantage, 4)}`,
      t(tokens.ratio?.[i], (r) => `ratio ${show(r, 4)} (after the update, to the sampler)`),
    ].filter(Boolean).join("\n");
    let at = -1;
    const mark = (node) => {
      box.querySelector(".at")?.classList.remove("at");
      node.classList.add("at");
      at = node.number;
      showTip(node, about(at));
    };
    box.addEventListener("mouseover", (e) => { if (e.target.number !== undefined) mark(e.target); });
    box.addEventListener("mouseleave", hideTip);
    box.addEventListener("blur", hideTip);
    box.addEventListener("keydown", (e) => {
      const move = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[e.key];
      const spans = box.querySelectorAll(".token");
      if (move === undefined || !spans.length) return;
      e.preventDefault();
      mark(spans[Math.min(Math.max(at + move, 0), spans.length - 1)]);
    });
    return box;
  }
  const t = (value, f) => value === null || value === undefined ? null : f(value);
  function showTip(node, text) {
    const tip = $("tip"), place = node.getBoundingClientRect();
    tip.textContent = text;
    tip.hidden = false;
    const left = Math.min(Math.max(place.left, 8), innerWidth - tip.offsetWidth - 8);
    const below = place.bottom + tip.offsetHeight + 12 < innerHeight;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(below ? place.bottom + 6 : place.top - tip.offsetHeight - 6) + scrollY}px`;
  }
  function hideTip() { $("tip").hidden = true; }

  // --- compare ----------------------------------------------------------------------------------

  let compared = ROWS;
  async function evaluation(value) {
    const [run, file] = value.split("/").map(Number);
    const part = await load(run, file), found = new Map();
    for (const group of part.groups) {
      const known = group.completions.filter((c) => typeof (c.accuracy ?? c.reward) === "number");
      if (known.length) {
        found.set(group.id, { group, score: mean(known.map((c) => c.accuracy ?? c.reward)) });
      }
    }
    return found;
  }
  async function compare() {
    const mine = ++ticket, [a, b] = [$("compare-a").value, $("compare-b").value];
    $("compare-more").hidden = true;
    $("compare-table").replaceChildren();
    if (!a || !b) {
      $("compare-status").textContent = "There are no evaluations to compare.";
      return;
    }
    const [first, second] = [await evaluation(a), await evaluation(b)];
    if (mine !== ticket || current !== "compare") return;
    const rows = [...first].filter(([key]) => second.has(key)).map(([key, one]) => {
      const two = second.get(key);
      return { group: one.group, other: two.group, a: one.score, b: two.score, change: two.score - one.score };
    });
    if (!rows.length) {
      $("compare-status").textContent = "These two have no prompt in common: they are of different tasks or splits.";
      return;
    }
    const changes = rows.map((r) => r.change), better = changes.filter((d) => d > 0).length;
    const worse = changes.filter((d) => d < 0).length;
    const side = (xs) => `${show(mean(xs))} ± ${show(error(xs))}`;
    $("compare-status").textContent = `${rows.length} prompts in both` +
      (rows.length < Math.max(first.size, second.size) ? ` (of ${first.size} and ${second.size})` : "") +
      `. A ${side(rows.map((r) => r.a))}, B ${side(rows.map((r) => r.b))}. ` +
      `B − A ${show(mean(changes))} ± ${show(error(changes))} (standard error of the pairs); ` +
      `B is better on ${better} and worse on ${worse}.`;
    const how = $("compare-filter").value;
    const kept = rows.filter((r) => how === "all" || (how === "changed" && r.change) ||
      (how === "better" && r.change > 0) || (how === "worse" && r.change < 0))
      .sort((x, y) => Math.abs(y.change) - Math.abs(x.change));
    $("compare-table").replaceChildren(kept.length ? el("table", {},
      el("thead", {}, row(["prompt", "A", "B", "B − A", "completion of A", "completion of B"], "th")),
      el("tbody", {}, ...kept.slice(0, compared).map((r) => row([
        longText(lastMessage(r.group.prompt)), show(r.a), show(r.b), show(r.change),
        longText(String(r.group.completions[0].completion ?? "")),
        longText(String(r.other.completions[0].completion ?? "")),
      ])))) : el("p", {}, "No prompt is like that."));
    $("compare-more").hidden = kept.length <= compared;
    $("compare-more").textContent = `More (${kept.length - compared} prompts left)`;
  }
  const lastMessage = (prompt) => typeof prompt === "string" ? prompt.trim().split("\n").at(-1)
    : String(prompt.at?.(-1)?.content ?? "");

  // --- config -----------------------------------------------------------------------------------

  function config() {
    const several = data.runs.length > 1, search = $("config-filter").value.toLowerCase();
    $("only-label").hidden = !several;
    const only = several && $("config-only").checked;
    const tables = [["config", (run) => run.config], ["provenance", (run) => run.provenance]].map(([title, of]) => {
      const names = [...new Set(data.runs.flatMap((run) => Object.keys(of(run))))].sort();
      const rows = names.filter((n) => n.toLowerCase().includes(search)).map((name) => {
        const values = data.runs.map((run) => of(run)[name]);
        const differs = new Set(values.map((v) => JSON.stringify(v ?? null))).size > 1;
        if (only && !differs) return null;
        const line = row([name, ...values.map((v) => visible(v ?? "–"))]);
        line.className = differs ? "differs" : "";
        return line;
      }).filter(Boolean);
      return el("div", {}, el("h2", {}, title), rows.length
        ? el("table", {}, el("thead", {}, row(["field", ...data.runs.map((run) => visible(run.name))], "th")), el("tbody", {}, ...rows))
        : el("p", {}, "No field is like that."));
    });
    $("config-table").replaceChildren(...tables);
  }

  // --- events -----------------------------------------------------------------------------------

  function later(f, wait = 150) {
    let timer;
    return () => { clearTimeout(timer); timer = setTimeout(f, wait); };
  }
  function move(by) {
    const slider = $("sample-slider");
    slider.value = Number(slider.value) + by;
    completions();
  }
  function listen() {
    for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (e) => e.preventDefault());
    const names = Object.keys(TABS);
    for (const name of names) {
      $(`tab-${name}`).addEventListener("click", () => open(name));
      $(`tab-${name}`).addEventListener("keydown", (e) => {
        const by = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
        if (by) open(names[(names.indexOf(name) + by + names.length) % names.length], true);
      });
    }
    addEventListener("hashchange", () => open(location.hash.slice(1)));
    $("metric-filter").addEventListener("input", later(curves));
    $("smoothing").addEventListener("input", later(curves));
    $("by-seed").addEventListener("change", curves);
    for (const id of ["sample-run", "sample-kind"]) {
      $(id).addEventListener("change", () => { following = null; $("sample-slider").value = 0; completions(); });
    }
    $("sample-slider").addEventListener("input", later(() => completions(), 60));
    for (const id of ["sample-filter", "sample-sort", "sample-shade"]) {
      $(id).addEventListener("change", () => completions(true));
    }
    $("sample-search").addEventListener("input", later(() => completions()));
    $("previous").addEventListener("click", () => move(-1));
    $("next").addEventListener("click", () => move(1));
    addEventListener("keydown", (e) => {
      if (current !== "completions" || e.target.matches("input[type=search], select") || following !== null) return;
      if (e.key === "[") move(-1);
      if (e.key === "]") move(1);
    });
    $("more").addEventListener("click", () => { shown = Math.max(shown, GROUPS) + 2 * GROUPS; completions(true); });
    for (const id of ["compare-a", "compare-b", "compare-filter"]) {
      $(id).addEventListener("change", () => { compared = ROWS; compare(); });
    }
    $("compare-more").addEventListener("click", () => { compared += 2 * ROWS; compare(); });
    $("config-filter").addEventListener("input", later(config));
    $("config-only").addEventListener("change", config);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (current === "curves") curves(); });
  }
  async function begin() {
    listen();
    const found = await unpack($("data").textContent);
    if (found.live) {
      $("status").textContent = "live";
      return poll();
    }
    data = found;
    refresh(true);
  }
  begin().catch((reason) => { $("status").textContent = `This page could not be shown: ${reason}`; });
})();
