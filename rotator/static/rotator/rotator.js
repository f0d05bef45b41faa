/* Reads the state of a rotation again and again, and shows it. Without it, the page reloads itself. */
"use strict";

(() => {
  const page = document.getElementById("rotator");
  if (!page) return;

  const FIRST = 2000;
  const LONGEST = 60000;
  const TIMEOUT = 10000;
  const SVG = "http://www.w3.org/2000/svg";

  const all = (selector) => page.querySelectorAll(selector);
  const one = (selector) => page.querySelector(selector);
  const age = one("[data-age]");
  let wait = FIRST;
  let timer = 0;
  let isReading = false;
  let shownAt = Date.now();
  let problem = "";

  const setText = (element, text) => {
    if (element.textContent !== text) element.textContent = text;
  };

  const make = (name, ...children) => {
    const element = document.createElement(name);
    element.append(...children);
    return element;
  };

  /* Replaces the children only if they have changed, so that a selection of text survives. */
  const fill = (element, items, toElements) => {
    const key = JSON.stringify(items);
    if (element.dataset.key === key) return;
    element.dataset.key = key;
    element.replaceChildren(...items.flatMap(toElements));
  };

  const makeSvg = (name, attributes, ...children) => {
    const element = document.createElementNS(SVG, name);
    for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
    element.append(...children);
    return element;
  };

  const band = ({ x, width, label, text }) => makeSvg(
    "svg", { x, width, height: "100%" },
    makeSvg("rect", { width: "100%", height: "100%" }, makeSvg("title", {}, text)),
    ...(label ? [makeSvg("text", { x: 4, y: 14 }, label)] : []),
  );

  const showChart = (chart) => {
    for (const element of all("[data-chart]")) setText(element, chart[element.dataset.chart]);
    for (const path of all("[data-path]")) path.setAttribute("d", chart[path.dataset.path]);
    fill(one("[data-bands]"), chart.bands, band);
    fill(one("[data-held-list]"), chart.bands, (each) => make("li", each.text));
    fill(one("[data-times]"), chart.times, (time) => make("span", time));
  };

  /* Shows the parts of the page that have something to show. */
  const showParts = (state) => {
    const has = {
      answered: state.can_answer,
      unanswered: !state.can_answer,
      running: !state.is_paused,
      paused: state.is_paused,
      latency: state.chart.latency_top,
      held: state.chart.bands.length,
      rejected: state.rejected.length,
      proof: state.proof.length,
      preflight: state.preflight.length,
    };
    for (const element of all("[data-if]")) element.hidden = !has[element.dataset.if];
  };

  const show = (state) => {
    for (const element of all("[data-text]")) {
      const text = state.text[element.dataset.text];
      setText(element, text);
      if (element.matches("pre, p")) element.hidden = !text;
    }
    if (page.dataset.tone !== state.tone) setText(one("[data-announcement]"), state.text.headline);
    page.dataset.tone = state.tone;
    one("progress").value = state.percent;
    fill(one("[data-list]"), state.left_out, (each) => make("li", each));
    for (const list of all("[data-facts]")) {
      fill(list, state[list.dataset.facts], ([label, value]) => [make("dt", label), make("dd", value)]);
    }
    fill(one("[data-log]"), state.log, (line) => make("tr", ...line.map((cell) => make("td", cell))));
    showChart(state.chart);
    showParts(state);
    for (const form of all("form")) {
      /* What a user has begun to fill in stays based on the revision that the user has seen. */
      if (form.dataset.begun !== "yes") form.elements.revision.value = state.revision;
    }
    /* While the site is updated, another version of it can answer. */
    wait = state.every_seconds * 1000 || FIRST;
    shownAt = Date.now();
    problem = "";
  };

  const showAge = () => {
    const seconds = Math.round((Date.now() - shownAt) / 1000);
    age.hidden = false;
    age.classList.toggle("rotator-old", Boolean(problem));
    const text = seconds < 5 ? "These figures are current." : `These figures are ${seconds} s old.`;
    setText(age, problem ? `${text} ${problem}` : text);
  };

  const read = async () => {
    if (isReading) return;
    isReading = true;
    clearTimeout(timer);
    try {
      const response = await fetch(page.dataset.url, {
        credentials: "same-origin",
        headers: { Accept: "application/json" },
        signal: AbortSignal.timeout(TIMEOUT),
      });
      const isState = (response.headers.get("Content-Type") || "").startsWith("application/json");
      if (response.redirected || response.status === 403) {
        problem = "You are not logged in any more, or lost the permission. Reload the page.";
      } else if (!response.ok || !isState) {
        problem = `The site answers with status ${response.status}.`;
      } else {
        show(await response.json());
      }
    } catch {
      problem = "The site does not answer.";
    }
    isReading = false;
    if (problem) wait = Math.min(LONGEST, wait * 2);
    showAge();
    if (!document.hidden) timer = setTimeout(read, wait);
  };

  for (const form of all("form")) {
    form.addEventListener("input", () => { form.dataset.begun = "yes"; });
  }
  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    if (!document.hidden) read();
  });
  setInterval(() => { if (!document.hidden) showAge(); }, 1000);
  timer = setTimeout(read, wait);
})();
