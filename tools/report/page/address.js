// What the reader chose lives in the address: #SECTION?NAME=VALUE&... A view can be linked, and a live
// page that draws itself again keeps it.
"use strict";

Report.state = (() => {
  let section = "";
  let values = new Map();
  const listeners = [];

  function parse() {
    const hash = location.hash.slice(1);
    const cut = hash.indexOf("?");
    section = cut < 0 ? hash : hash.slice(0, cut);
    values = new Map(cut < 0 ? [] : new URLSearchParams(hash.slice(cut + 1)));
  }

  function hash(where, chosen) {
    const query = new URLSearchParams([...chosen]).toString();
    return "#" + where + (query ? "?" + query : "");
  }

  function merged(changes) {
    const chosen = new Map(values);
    for (const [name, value] of Object.entries(changes || {})) {
      if (value === null || value === undefined || value === "") chosen.delete(name);
      else chosen.set(name, String(value));
    }
    return chosen;
  }

  function differences(before, after) {
    const names = new Set([...before.keys(), ...after.keys()]);
    return new Set([...names].filter((name) => before.get(name) !== after.get(name)));
  }

  function tell(changed) {
    if (changed.size) listeners.forEach((listener) => listener(changed));
  }

  // Takes over new values without scrolling and without a new entry in the history.
  function replace(where, chosen) {
    const changed = differences(values, chosen);
    section = where;
    values = chosen;
    history.replaceState(null, "", hash(where, chosen) === "#" ? "#top" : hash(where, chosen));
    tell(changed);
  }

  function scroll() {
    const target = document.getElementById(section);
    if (target) target.scrollIntoView();
  }

  window.addEventListener("hashchange", () => {
    const before = values;
    parse();
    tell(differences(before, values));
    scroll();
  });
  parse();

  return {
    get: (name, fallback = "") => (values.has(name) ? values.get(name) : fallback),
    set: (changes) => replace(section, merged(changes)),
    go: (where, changes) => {
      replace(where, merged(changes));
      scroll();
    },
    link: (where, changes) => hash(where, merged(changes)),
    listen: (listener) => listeners.push(listener),
    scroll,
    get section() {
      return section;
    },
    // A name that holds several ids, as the enlarged charts do.
    has: (name, id) => (values.get(name) || "").split(",").includes(id),
    toggle(name, id) {
      const ids = (values.get(name) || "").split(",").filter(Boolean);
      const rest = ids.filter((other) => other !== id);
      this.set({[name]: (rest.length < ids.length ? rest : [...ids, id]).join(",")});
    },
  };
})();
