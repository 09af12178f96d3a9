// The page of tools/watch.py: asks its server for new data, draws them, and says how fresh they are. A
// page that is a file has no DATA.live, and none of this runs.
"use strict";

(() => {
  const STATES = {
    running: "live",
    ended: "the run has ended",
    stopped: "the run was stopped: no process writes to it",
    unknown: "it is not known whether the run goes on",
  };
  let every = 0;
  let tag = null;
  let updated = "";
  let timer = 0;
  let asking = false;
  let live = null;

  const clock = () => new Date().toTimeString().slice(0, 8);

  function show(state, sentence) {
    const text = updated ? `${sentence} \u00b7 updated ${updated}` : sentence;
    let line = document.getElementById("live");
    if (!line) document.body.append(line = Report.el("p", {id: "live", role: "status"}));
    if (line.dataset.state === state && line.textContent === text) return;
    line.dataset.state = state;
    line.textContent = text;
  }

  // Of several runs the page is live while one of them is.
  function stateOf({states, waiting}) {
    if (waiting.length) return ["waiting", waiting.join(" ")];
    const state = ["running", "unknown", "stopped", "ended"].find((name) => states.includes(name));
    return [state, states.length > 1 && state === "ended" ? "the runs have ended" : STATES[state]];
  }

  // null where nothing, or not all of it, arrived.
  async function answered() {
    try {
      const answer = await fetch("data.json", {headers: tag ? {"If-None-Match": tag} : {}});
      return {answer, data: answer.status === 200 ? await answer.json() : null};
    } catch (error) {
      return null;
    }
  }

  function take({answer, data}) {
    every = data.live.every;
    try {
      Report.draw(data);
    } catch (error) {
      reportError(error);
      show("gone", "the new data cannot be drawn");
      return;
    }
    tag = answer.headers.get("ETag");
    updated = clock();
    live = data.live;
    show(...stateOf(live));
  }

  async function ask() {
    if (asking) return;
    asking = true;
    const found = await answered();
    if (!found) show("gone", "the server does not answer: it has ended, or the tunnel is closed");
    else if (found.data) take(found);
    else if (found.answer.status === 304) show(...stateOf(live));
    else show("gone", `the server answered ${found.answer.status}`);
    asking = false;
    clearTimeout(timer);
    if (!document.hidden) timer = setTimeout(ask, every * 1000);
  }

  Report.live = (first) => {
    every = first.every;
    show("waiting", "reading the run");
    document.addEventListener("visibilitychange", () => document.hidden || ask());
    ask();
  };

  window.addEventListener("load", () => window.DATA.live && Report.live(window.DATA.live));
})();
