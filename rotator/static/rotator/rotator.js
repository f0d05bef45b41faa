/* Reads the state of a rotation again and again, and shows it. Without it, the page reloads itself. */
"use strict";

(() => {
  const page = document.getElementById("rotator");
  if (!page) return;

  const EVERY = 2000;
  const EVERY_WITHOUT_OWNER = 5000;
  const EVERY_WHEN_FINISHED = 30000;
  const LONGEST = 60000;
  const TIMEOUT = 10000;
  const SVG = "http://www.w3.org/2000/svg";

  const all = (selector) => page.querySelectorAll(selector);
  const one = (selector) => page.querySelector(selector);
  const age = one("[data-age]");
  const announcement = one("[data-announcement]");
  let wait = EVERY;
  let timer = 0;
  let isReading = false;
  let shownAt = Date.now();
  let problem = "";
  let tone = page.dataset.tone;

  const setText = (element, text) => {
    if (element && element.textContent !== text) element.textContent = text;
  };

  const make = (name, text) => {
    const element = document.createElement(name);
    element.textContent = text;
    return element;
  };

  /* Replaces the children only if they have changed, so that a selection of text survives. */
  const fill = (element, children, key) => {
    if (!element || element.dataset.key === key) return;
    element.dataset.key = key;
    element.replaceChildren(...children());
  };

  const band = (each) => {
    const outer = document.createElementNS(SVG, "svg");
    outer.setAttribute("x", each.x);
    outer.setAttribute("width", each.width);
    outer.setAttribute("height", "100%");
    const rect = document.createElementNS(SVG, "rect");
    rect.setAttribute("width", "100%");
    rect.setAttribute("height", "100%");
    const title = document.createElementNS(SVG, "title");
    title.textContent = each.text;
    rect.append(title);
    outer.append(rect);
    if (each.label) {
      const text = document.createElementNS(SVG, "text");
      text.setAttribute("x", "4");
      text.setAttribute("y", "14");
      text.textContent = each.label;
      outer.append(text);
    }
    return outer;
  };

  const showChart = (chart) => {
    for (const element of all("[data-chart]")) setText(element, chart[element.dataset.chart]);
    for (const path of all("[data-path]")) path.setAttribute("d", chart[path.dataset.path]);
    const key = JSON.stringify(chart.bands);
    fill(one("[data-bands]"), () => chart.bands.map(band), key);
    fill(one("[data-held-list]"), () => chart.bands.map((each) => make("li", each.text)), key);
    one("[data-held]").hidden = !chart.bands.length;
    one("[data-latency]").hidden = !chart.latency_top;
    fill(one("[data-times]"), () => chart.times.map((time) => make("span", time)), String(chart.times));
  };

  const showControls = (state) => {
    for (const element of all("[data-answered]")) element.hidden = !state.can_answer;
    for (const element of all("[data-unanswered]")) element.hidden = state.can_answer;
    for (const element of all("[data-when]")) {
      element.hidden = (element.dataset.when === "paused") !== state.is_paused;
    }
    for (const form of all("form")) {
      /* What a user has begun to fill in stays based on the revision that the user has seen. */
      const isBegun = form.dataset.begun === "yes";
      if (!isBegun && form.elements.revision) form.elements.revision.value = state.revision;
    }
  };

  const show = (state) => {
    for (const element of all("[data-text]")) {
      const text = state.text[element.dataset.text];
      setText(element, text);
      if (element.matches("pre, p")) element.hidden = !text;
    }
    page.dataset.tone = state.tone;
    if (tone !== state.tone) setText(announcement, state.text.headline);
    tone = state.tone;
    one("progress").value = state.percent;
    fill(one("[data-list]"), () => state.left_out.map((each) => make("li", each)), String(state.left_out));
    for (const list of all("[data-facts]")) {
      const facts = state[list.dataset.facts];
      const children = () => facts.flatMap(([label, value]) => [make("dt", label), make("dd", value)]);
      fill(list, children, JSON.stringify(facts));
    }
    for (const element of all("[data-section]")) {
      element.hidden = !state[element.dataset.section].length;
    }
    const row = (line) => {
      const element = document.createElement("tr");
      element.append(...line.map((cell) => make("td", cell)));
      return element;
    };
    fill(one("[data-log]"), () => state.log.map(row), JSON.stringify(state.log));
    showChart(state.chart);
    showControls(state);
    /* Where no process works on it, the figures do not change until a user resumes the rotation. */
    const everyUnfinished = state.can_answer ? EVERY : EVERY_WITHOUT_OWNER;
    wait = state.is_unfinished ? everyUnfinished : EVERY_WHEN_FINISHED;
    shownAt = Date.now();
    problem = "";
    page.dataset.revision = state.revision;
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
