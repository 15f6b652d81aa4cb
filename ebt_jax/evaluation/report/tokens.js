"use strict";
// The token view: a text whose tokens are shaded by a number, and a panel with what the
// model thought about the one that is pointed at, tapped, or reached with arrow keys.
// data.thoughts is a list, one for each run that has a model:
//   name, steps (trained), target, before: ids; starts, scored: 0 or 1;
//   nll, energy: [candidate][token]; norm: [step][token]; top, probability:
//   [candidate][token][k]; taken: [token], steps of a policy, or null;
//   labels, texts: id -> string

const SHADES = [
  { name: "loss", label: "loss, as trained", of: (t, i) => t.nll[trained(t)][i] },
  { name: "gain", label: "what refinement gained", of: (t, i) => (t.energy ? t.nll[0][i] - t.nll[trained(t)][i] : null) },
  { name: "energy", label: "final energy", of: (t, i) => (t.energy ? t.energy[t.energy.length - 1][i] : null) },
  { name: "drop", label: "drop of the energy", of: (t, i) => (t.energy ? t.energy[0][i] - t.energy[t.energy.length - 1][i] : null) },
  { name: "taken", label: "steps the policy took", of: (t, i) => (t.taken ? t.taken[i] : null) },
];

function trained(thoughts) {
  return Math.min(thoughts.steps, thoughts.nll.length - 1);
}

function percent(probability) {
  if (probability === null) return "–";
  if (probability > 0 && probability < 0.0005) return "<0.1 %";
  return `${(100 * probability).toFixed(probability < 0.0995 ? 1 : 0)} %`;
}

function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

function tokenView(root) {
  const text = root.querySelector(".text");
  const panel = root.querySelector(".panel");
  const bar = root.querySelector(".controls");
  const range = root.querySelector(".range");
  let thoughts = data.thoughts[0], shade = SHADES[0], now = 0, pinned = false, spans = [];

  const runs = html("select", {}, html("label", {}, bar, "run "));
  data.thoughts.forEach((t, i) => html("option", { value: i }, runs, t.name));
  const shades = html("select", {}, html("label", {}, bar, "shaded by "));
  runs.addEventListener("change", () => { thoughts = data.thoughts[runs.value]; offerShades(); write(); show(Math.min(now, spans.length - 1)); });
  shades.addEventListener("change", () => { shade = SHADES.find((s) => s.name === shades.value); paint(); });

  function offerShades() {
    const known = SHADES.filter((s) => thoughts.target.some((_, i) => s.of(thoughts, i) !== null));
    if (!known.includes(shade)) shade = known[0];
    shades.replaceChildren();
    for (const s of known) html("option", { value: s.name }, shades, s.label);
    shades.value = shade.name;
  }

  function write() {
    text.replaceChildren();
    let line = text;
    spans = thoughts.target.map((id, i) => {
      if (thoughts.starts[i]) {
        line = html("span", { class: i ? "sequence" : "" }, text);
        html("span", { class: "given", title: "given, not predicted" }, line, visible(thoughts.before[i]));
      }
      const span = html("span", { class: "token", role: "option", id: `token-${i}`, "aria-selected": "false" }, line, visible(id));
      if (visible(id) !== thoughts.texts[id]) span.classList.add("invisible");
      span.dataset.i = i;
      return span;
    });
    paint();
  }

  // As it stands in the text; a line end is seen and kept.
  function visible(id) {
    const there = thoughts.texts[id];
    if (there === "\n") return "↵\n";
    return there === " " ? " " : there.trim() === "" || there.includes("\ufffd") ? thoughts.labels[id] : there;
  }

  function paint() {
    const values = spans.map((_, i) => (thoughts.scored[i] ? shade.of(thoughts, i) : null));
    const sorted = values.filter((v) => v !== null).sort((a, b) => a - b);
    if (!sorted.length) { range.textContent = ""; return; }
    const low = quantile(sorted, 0.02), high = quantile(sorted, 0.98);
    spans.forEach((span, i) => {
      const v = values[i] === null || high === low ? 0 : (values[i] - low) / (high - low);
      span.style.setProperty("--v", Math.min(1, Math.max(0, v)).toFixed(3));
    });
    range.replaceChildren(`${short(low)} `, html("span", { class: "ramp" }), ` ${short(high)}`);
  }

  function show(i) {
    const old = spans[now];
    if (old) { old.classList.remove("now", "pinned"); old.setAttribute("aria-selected", "false"); }
    now = i;
    spans[i].classList.add("now");
    spans[i].classList.toggle("pinned", pinned);
    spans[i].setAttribute("aria-selected", "true");
    text.setAttribute("aria-activedescendant", spans[i].id);
    describe(i);
  }

  function describe(i) {
    const t = thoughts, target = t.target[i];
    panel.replaceChildren();
    const head = html("h3", {}, panel, `Token ${i + 1} of ${t.target.length}: after `);
    html("code", {}, head, t.labels[t.before[i]]);
    head.append(" comes ");
    html("code", {}, head, t.labels[target]);
    const loss = t.nll[trained(t)][i];
    const how = t.energy ? ` after ${trained(t)} steps, as trained` : "";
    const policy = t.taken ? ` The policy took ${t.taken[i]} steps.` : "";
    html("p", { class: "faint" }, panel, t.scored[i] ? `Loss ${short(loss)} nats${how}; the right token is underlined.${policy}` : "Not scored (padding).");
    const table = html("table", {}, panel);
    const top = html("tr", {}, html("thead", {}, table));
    const columns = t.energy ? ["Step", "Energy", "Gradient", "Right token", "Likeliest"] : ["", "Right token", "Likeliest"];
    for (const name of columns) html("th", { scope: "col", class: name === "Gradient" ? "gradient" : "" }, top, name);
    const body = html("tbody", {}, table);
    t.nll.forEach((losses, step) => {
      const row = html("tr", { class: t.energy && step === trained(t) ? "trained" : "" }, body);
      html("th", { scope: "row" }, row, t.energy ? (step ? String(step) : "start") : "prediction");
      if (t.energy) {
        html("td", {}, row, short(t.energy[step][i]));
        html("td", { class: "gradient" }, row, step < t.norm.length ? short(t.norm[step][i]) : "");
      }
      html("td", {}, row, percent(losses[i] === null ? null : Math.exp(-losses[i])));
      const chips = html("div", { class: "chips" }, html("td", {}, row));
      t.top[step][i].forEach((id, k) => {
        const chip = html("span", { class: id === target ? "chip right" : "chip" }, chips);
        html("code", {}, chip, t.labels[id]);
        chip.append(` ${percent(t.probability[step][i][k])}`);
      });
    });
  }

  function above(i, direction) {
    const place = (span) => span.getClientRects()[0];
    const from = place(spans[i]);
    let best = i, distance = Infinity;
    for (let j = i + direction; j >= 0 && j < spans.length; j += direction) {
      const to = place(spans[j]);
      if (Math.abs(to.top - from.top) < 4) continue;
      if (best !== i && Math.abs(to.top - place(spans[best]).top) > 4) break;
      if (Math.abs(to.left - from.left) < distance) { distance = Math.abs(to.left - from.left); best = j; }
    }
    return best;
  }

  const of = (event) => event.target.closest(".token");
  text.addEventListener("pointerover", (event) => { if (of(event) && !pinned && event.pointerType === "mouse") show(Number(of(event).dataset.i)); });
  text.addEventListener("click", (event) => {
    if (!of(event)) return;
    const i = Number(of(event).dataset.i);
    pinned = !(pinned && i === now);
    show(i);
  });
  text.addEventListener("keydown", (event) => {
    const moves = {
      ArrowLeft: () => Math.max(0, now - 1), ArrowRight: () => Math.min(spans.length - 1, now + 1),
      ArrowUp: () => above(now, -1), ArrowDown: () => above(now, 1),
      Home: () => 0, End: () => spans.length - 1,
    };
    if (event.key === "Escape") { pinned = false; show(now); }
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]());
    spans[now].scrollIntoView({ block: "nearest" });
  });

  offerShades();
  write();
  show(0);
}

document.querySelectorAll("[data-view=tokens]").forEach(tokenView);
