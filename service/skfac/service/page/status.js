"use strict";
// Asks for the status again and again and shows it. Names and messages come from clients:
// they get into the page as text, by textContent and setAttribute, and in no other way.
(() => {
  const EVERY_MS = 2000, PATIENCE_MS = 5000, KEPT = 60;
  const PARTS = ["receive", "assemble", "queue", "solve", "publish"], WHOLE = "end to end";
  const SVG = "http://www.w3.org/2000/svg";
  const $ = (id) => document.getElementById(id);
  const points = []; // the latest KEPT: mean seconds by stage, of one answer to the next
  let before = null, answeredAt = null;

  // ------------------------------------------------------------------ words

  const seconds = (s) => {
    if (s < 1e-3) return `${(s * 1e6).toFixed(0)} µs`;
    if (s < 1) return `${(s * 1e3).toFixed(s < 0.01 ? 2 : 1)} ms`;
    return s < 10 ? `${s.toFixed(2)} s` : `${s.toFixed(0)} s`;
  };
  const age = (s) => {
    if (s < 120) return `${s.toFixed(0)} s`;
    if (s < 7200) return `${(s / 60).toFixed(0)} min`;
    return s < 172800 ? `${(s / 3600).toFixed(0)} h` : `${(s / 86400).toFixed(0)} d`;
  };
  const bytes = (n) => {
    const GiB = 2 ** 30, MiB = 2 ** 20;
    return n < GiB ? `${(n / MiB).toFixed(1)} MiB` : `${(n / GiB).toFixed(1)} GiB`;
  };
  const words = (text) => ({ text, words: true });
  const className = (stage) => stage.replaceAll(" ", "-");

  // ------------------------------------------------------------------ tables

  const element = (name, role, text) => {
    const made = document.createElement(name);
    if (role) made.setAttribute("role", role);
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const cell = (value, label) => {
    const { text, words: isWords, bad, key } = value instanceof Object ? value : { text: value };
    const made = element("td", "cell");
    made.dataset.label = label;
    const isolated = element("bdi", "", text); // a name must not turn the text around it
    if (key) isolated.prepend(keyOf(key));
    made.append(isolated);
    made.classList.toggle("words", Boolean(isWords));
    made.classList.toggle("bad", Boolean(bad));
    return made;
  };

  const keyOf = (stage) => {
    const key = element("span");
    key.className = `key ${className(stage)}`;
    key.setAttribute("aria-hidden", "true");
    return key;
  };

  const fill = (id, columns, rows, none) => {
    const table = $(id);
    const heads = columns.map(([label, isWords]) => {
      const head = element("th", "columnheader", label);
      head.scope = "col";
      head.classList.toggle("words", Boolean(isWords));
      return head;
    });
    table.tHead.rows[0].replaceChildren(...heads);
    const made = rows.map((row) => {
      const tr = element("tr", "row");
      tr.append(...row.map((value, place) => cell(value, columns[place][0])));
      return tr;
    });
    if (!made.length) {
      const only = element("td", "cell", none);
      only.colSpan = columns.length;
      only.className = "words only";
      made.push(element("tr", "row"));
      made[0].append(only);
    }
    table.tBodies[0].replaceChildren(...made);
  };

  // ------------------------------------------------------------------ parts of the page

  const showLoad = ({ sessions, load }) => {
    $("session-count").textContent = sessions.length;
    $("queue").textContent = load.queue_depth
      ? `${load.queue_depth}, oldest ${seconds(load.queue_s)}` : "0";
    $("busy").textContent = `${(100 * load.busy_share).toFixed(0)} %`;
    $("memory").textContent = load.memory_total_bytes
      ? `${bytes(load.memory_bytes)} of ${bytes(load.memory_total_bytes)}` : "not known";
  };

  const showSessions = ({ sessions }) => {
    const columns = [["Job", true], ["Ranks"], ["Layers"], ["Age"], ["Solved"], ["Queued"],
      ["Lost"], ["Refused"], ["History"], ["p50"], ["p99"]];
    const rows = sessions.map((s) => [
      words(s.job), `${s.open_ranks}/${s.world_size}`, s.layer_count, age(s.age_s), s.solved,
      s.queued, s.superseded + s.failed, s.refused, bytes(s.history_bytes),
      seconds(s.inversion.p50_s), seconds(s.inversion.p99_s),
    ]);
    fill("sessions", columns, rows, "No session is open.");
  };

  const showErrors = ({ errors }) => {
    const columns = [["Ago"], ["Job", true], ["Layer", true], ["Kind"], ["Times"],
      ["Message", true]];
    const rows = errors.map((e) => [
      age(e.age_s), words(e.job), words(e.layer || "–"), e.kind, e.count,
      words(e.message),
    ]);
    fill("errors", columns, rows, "Nothing failed or was refused.");
  };

  const showLayers = ({ sessions }) => {
    const columns = [["Job", true], ["Layer", true], ["Version (step)"], ["Rows"],
      ["Steps behind"]];
    const rows = sessions.flatMap((s) => s.layers.map((layer) => [
      words(s.job), words(layer.name), layer.newest_step ?? "none", layer.rows,
      { text: layer.behind_steps ?? "–", bad: layer.newest_step === null },
    ]));
    fill("layers", columns, rows, "There are no layers.");
    const missing = sessions.reduce((sum, s) => sum + s.layer_count - s.layers.length, 0);
    const less = missing ? ` ${missing} layers that are less far behind are not shown.` : "";
    $("layers-note").textContent =
      `Steps behind: from the version to the newest step that rows have come of.${less}`;
  };

  const showStages = ({ stages }) => {
    const newest = points.at(-1) ?? {};
    const columns = [["Stage", true], ["Now"], ["p50"], ["p99"], ["Timed"]];
    const rows = stages.map((s) => [
      { text: s.stage, words: true, key: s.stage },
      newest[s.stage] === undefined ? "–" : seconds(newest[s.stage]),
      seconds(s.latest.p50_s), seconds(s.latest.p99_s), s.count,
    ]);
    fill("stages", columns, rows, "Nothing was solved yet.");
  };

  // ------------------------------------------------------------------ the chart

  const remember = (status) => {
    const was = new Map((before?.stages ?? []).map((s) => [s.stage, s]));
    if (before && status.uptime_s > before.uptime_s) {
      const point = {};
      for (const { stage, count, total_s } of status.stages) {
        const more = count - (was.get(stage)?.count ?? 0);
        if (more > 0) point[stage] = (total_s - (was.get(stage)?.total_s ?? 0)) / more;
      }
      points.push(point);
      if (points.length > KEPT) points.shift();
    } else {
      points.length = 0; // another engine answers
    }
    before = status;
  };

  const draw = (name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const roundUp = (s) => {
    const power = 10 ** Math.floor(Math.log10(s));
    return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= s * 0.999);
  };

  const showChart = () => {
    const svg = $("chart"), width = svg.clientWidth, height = svg.clientHeight;
    const left = 64, top = 14, bottom = height - 22, right = width - 8;
    const sums = points.map((p) => PARTS.reduce((sum, part) => sum + (p[part] ?? 0), 0));
    const most = Math.max(...sums, ...points.map((p) => p[WHOLE] ?? 0), 0);
    if (!most) { svg.replaceChildren(); return; }
    const end = roundUp(most), slot = (right - left) / KEPT;
    const x = (place) => right - (points.length - place) * slot;
    const y = (s) => bottom - (s / end) * (bottom - top);
    const marks = [];
    for (const s of [0, end / 2, end]) {
      marks.push(draw("line", { class: "grid", x1: left, x2: right, y1: y(s), y2: y(s) }));
      marks.push(draw("text", { x: left - 6, y: y(s) + 4, "text-anchor": "end" }, seconds(s)));
    }
    points.forEach((point, place) => {
      let below = 0;
      for (const part of PARTS) {
        const s = point[part] ?? 0;
        if (s) marks.push(draw("rect", { class: part, x: x(place), width: Math.max(slot - 1, 1),
          y: y(below + s), height: y(below) - y(below + s) }));
        below += s;
      }
    });
    const whole = points.map((p, place) => [x(place) + slot / 2, p[WHOLE]])
      .filter(([, s]) => s !== undefined).map(([at, s]) => `${at},${y(s)}`);
    marks.push(draw("polyline", { class: "total", points: whole.join(" ") }));
    marks.push(draw("text", { x: left, y: height - 6 }, `${(KEPT * EVERY_MS) / 1000} s ago`));
    marks.push(draw("text", { x: right, y: height - 6, "text-anchor": "end" }, "now"));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren(...marks);
    $("chart-caption").textContent =
      "Mean seconds of each stage, every 2 s, one on top of the other; the line is end to end. " +
      "The table has the numbers.";
  };

  // ------------------------------------------------------------------ the loop

  const show = (status) => {
    remember(status);
    $("server").textContent =
      `${status.version} on ${status.device}, up ${age(status.uptime_s)}`;
    for (const part of [showLoad, showStages, showSessions, showErrors, showLayers]) part(status);
    showChart();
  };

  const found = () => {
    answeredAt = new Date();
    $("lost").hidden = true;
    document.body.classList.remove("lost");
  };

  const lost = (why) => {
    const since = answeredAt
      ? `since ${answeredAt.toLocaleTimeString()}; what is below is from then` : "yet";
    const text = `The server cannot be reached: no answer ${since}. (${why})`;
    if ($("lost").textContent !== text) $("lost").textContent = text; // said once
    $("lost").hidden = false;
    document.body.classList.add("lost");
  };

  const fetched = async () => {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    const answer = await fetch("status.json", { cache: "no-store", signal });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    return answer.json();
  };

  const ask = async () => {
    let status;
    try {
      status = await fetched();
    } catch (error) {
      lost(error.message);
      return;
    }
    found();
    show(status);
  };

  const loop = async () => {
    try {
      if (!document.hidden) await ask();
    } finally {
      setTimeout(loop, EVERY_MS);
    }
  };

  addEventListener("resize", showChart);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
  loop();
})();
