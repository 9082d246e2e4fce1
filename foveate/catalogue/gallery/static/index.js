/* The index: search, facets, order and view; all of its state is in the address after the #. */
(function () {
  "use strict";
  var data = window.foveateGallery;
  var search = null; // made when it is first needed
  var byKey = {};
  data.papers.forEach(function (paper) { byKey[paper.key] = paper; });
  var FACETS = Array.from(document.querySelectorAll("#facets fieldset"), function (f) { return f.dataset.facet; }).concat(["tag"]);
  var VIEWS = ["cards", "table", "evidence"];
  var ORDERS = {
    best: null,
    name: function (p) { return p.name.toLowerCase(); },
    year: function (p) { return p.date; },
    family: function (p) { return data.order.family.indexOf(p.facets.family[0]); },
    status: function (p) { return data.order.status.indexOf(p.facets.status[0]); },
    modality: function (p) { return p.facets.modality.join(); },
    direction: function (p) { return p.facets.direction[0]; },
    complexity: function (p) { return p.facets.complexity[0]; },
    verification: function (p) { return p.facets.verification[0] === "none" ? "~" : p.facets.verification[0]; }
  };
  var DOWN = {year: true}; // orders that begin with the largest

  var $ = function (id) { return document.getElementById(id); };
  var box = $("q"), order = $("order");
  var cards = elements("#cards > li"), rows = elements("#table tbody tr"), points = elements("#evidence [data-key]");
  var front = Array.from(document.querySelectorAll("#cards > li"), function (li) { return li.dataset.key; });
  var pages = elements(".card h3 a, #table th a, #evidence a", function (a) {
    return a.getAttribute("href").replace(/^.*\/|\.html.*$/g, "");
  });
  var state = read();

  function elements(selector, key) {
    var found = {};
    document.querySelectorAll(selector).forEach(function (element) {
      var name = key ? key(element) : element.dataset.key;
      (found[name] = found[name] || []).push(element);
    });
    return found;
  }

  /* ---------------------------------------------------------------- state <-> address */
  function read() {
    var given = new Map();
    location.hash.replace(/^#/, "").split("&").forEach(function (part) {
      var at = part.indexOf("=");
      if (at > 0) {
        try {
          given.set(part.slice(0, at), decodeURIComponent(part.slice(at + 1)));
        } catch (error) {
          // a broken escape in a hand-made address: that part is left out
        }
      }
    });
    var found = {q: given.get("q") || "", sort: given.get("sort") || "best", down: null, view: given.get("view"), chosen: {}};
    var turned = /^(.*)-(up|down)$/.exec(found.sort);
    if (turned) { found.sort = turned[1]; found.down = turned[2] === "down"; }
    if (!(found.sort in ORDERS)) found.sort = "best";
    if (found.down === null) found.down = !!DOWN[found.sort];
    if (!VIEWS.includes(found.view)) found.view = "cards";
    FACETS.forEach(function (facet) {
      var values = (given.get(facet) || "").split(",").filter(function (v) { return v && known(facet, v); });
      if (values.length) found.chosen[facet] = values;
    });
    return found;
  }

  function known(facet, value) {
    return data.papers.some(function (p) { return p.facets[facet].includes(value); }) ||
      (facet === "status" && data.order.status.includes(value));
  }

  function written() {
    var parts = [];
    if (state.q.trim()) parts.push("q=" + encodeURIComponent(state.q.trim()));
    FACETS.forEach(function (facet) {
      if (state.chosen[facet]) parts.push(facet + "=" + state.chosen[facet].map(encodeURIComponent).join(","));
    });
    if (state.sort !== "best") {
      parts.push("sort=" + state.sort + (state.down === !!DOWN[state.sort] ? "" : state.down ? "-down" : "-up"));
    }
    if (state.view !== "cards") parts.push("view=" + state.view);
    return parts.join("&");
  }

  /* Typing is one step of the history, every other change is one of its own. */
  var typing = false;
  function remember(typed) {
    var text = written();
    if (location.hash.replace(/^#/, "") !== text) {
      var address = text ? "#" + text : location.href.split("#")[0];
      if (typed && typing) history.replaceState(null, "", address);
      else history.pushState(null, "", address);
    }
    typing = !!typed;
  }

  function change(typed) {
    remember(typed);
    show();
  }

  /* ---------------------------------------------------------------- what fits */
  function fits(paper, except) {
    return FACETS.every(function (facet) {
      var chosen = state.chosen[facet];
      return facet === except || !chosen || chosen.some(function (v) { return paper.facets[facet].includes(v); });
    });
  }

  function prepare() {
    search = search || window.foveateSearch(data);
  }

  function ranked() {
    if (!state.q.trim()) return front;
    prepare();
    var hits = search(state.q);
    return hits === null ? front : hits.map(function (hit) { return hit.key; });
  }

  function sorted(keys) {
    var by = ORDERS[state.sort];
    if (!by) return keys;
    var sign = state.down ? -1 : 1;
    return keys.map(function (key, i) { return [by(byKey[key]), i, key]; }).sort(function (a, b) {
      return a[0] < b[0] ? -sign : a[0] > b[0] ? sign : a[1] - b[1];
    }).map(function (item) { return item[2]; });
  }

  /* ---------------------------------------------------------------- showing it */
  function show() {
    var found = ranked();
    var keys = sorted(found.filter(function (key) { return fits(byKey[key]); }));
    place($("cards"), cards, keys);
    place(document.querySelector("#table tbody"), rows, keys);
    var shown = new Set(keys);
    Object.keys(points).forEach(function (key) {
      points[key].forEach(function (point) { point.classList.toggle("away", !shown.has(key)); });
    });
    count(found);
    if (box.value.trim() !== state.q.trim()) box.value = state.q;
    order.value = Array.from(order.options).some(function (o) { return o.value === state.sort; }) ? state.sort : "best";
    VIEWS.forEach(function (view) { $(view).hidden = view !== state.view || (!keys.length && view !== "evidence"); });
    document.querySelectorAll(".switch button").forEach(function (button) {
      button.setAttribute("aria-pressed", String(button.dataset.view === state.view));
    });
    document.querySelectorAll("#table th[data-sort]").forEach(function (head) {
      if (head.dataset.sort === state.sort) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    $("nothing").hidden = keys.length > 0 || state.view === "evidence";
    $("found").textContent = keys.length === data.papers.length ? keys.length + " papers" :
      keys.length + " of " + data.papers.length + " papers";
    pills();
    links();
  }

  function place(parent, items, keys) {
    var shown = new Set(keys);
    Object.keys(items).forEach(function (key) { items[key][0].hidden = !shown.has(key); });
    var at = parent.firstElementChild;
    keys.forEach(function (key) {
      var item = items[key][0];
      if (item === at) at = at.nextElementSibling;
      else parent.insertBefore(item, at);
    });
  }

  /* Beside each value: how many papers choosing it would show. */
  function count(found) {
    document.querySelectorAll("#facets fieldset").forEach(function (set) {
      var facet = set.dataset.facet, numbers = {}, most = 1;
      found.forEach(function (key) {
        if (fits(byKey[key], facet)) byKey[key].facets[facet].forEach(function (v) { numbers[v] = (numbers[v] || 0) + 1; });
      });
      Object.keys(numbers).forEach(function (v) { most = Math.max(most, numbers[v]); });
      set.querySelectorAll(".value").forEach(function (value) {
        var input = value.querySelector("input"), n = numbers[input.value] || 0;
        input.checked = (state.chosen[facet] || []).includes(input.value);
        value.classList.toggle("empty", !n && !input.checked);
        value.querySelector(".value-count").textContent = n;
        value.querySelector(".value-bar span").style.width = 100 * n / most + "%";
      });
    });
  }

  function pills() {
    var list = $("pills");
    list.textContent = "";
    FACETS.forEach(function (facet) {
      (state.chosen[facet] || []).forEach(function (value) {
        var item = document.createElement("li"), button = document.createElement("button");
        button.type = "button";
        button.className = "pill";
        button.textContent = facet + ": " + value + (facet === "tag" ? ", " + data.tags[value] : "");
        button.setAttribute("aria-label", button.textContent + ", remove this filter");
        button.addEventListener("click", function () { toggle(facet, value, false); box.focus(); });
        item.appendChild(button);
        list.appendChild(item);
      });
    });
    list.hidden = !list.children.length;
  }

  /* A page opened from here can lead back to here. */
  function links() {
    var text = written();
    Object.keys(pages).forEach(function (key) {
      pages[key].forEach(function (a) {
        a.setAttribute("href", "papers/" + key + ".html" + (text ? "#back=" + encodeURIComponent(text) : ""));
      });
    });
  }

  function toggle(facet, value, on) {
    var values = (state.chosen[facet] || []).filter(function (v) { return v !== value; });
    if (on) values.push(value);
    if (values.length) state.chosen[facet] = values;
    else delete state.chosen[facet];
    change();
  }

  /* ---------------------------------------------------------------- events */
  box.addEventListener("focus", prepare);
  box.addEventListener("input", function () { state.q = box.value; change(true); });
  $("facets").addEventListener("change", function (event) { toggle(event.target.name, event.target.value, event.target.checked); });
  $("facets").addEventListener("submit", function (event) { event.preventDefault(); });
  order.addEventListener("change", function () { state.sort = order.value; state.down = !!DOWN[state.sort]; change(); });
  document.querySelectorAll(".switch button").forEach(function (button) {
    button.addEventListener("click", function () { state.view = button.dataset.view; change(); });
  });
  document.querySelectorAll("#table th[data-sort] button").forEach(function (button) {
    button.addEventListener("click", function () {
      var by = button.parentElement.dataset.sort;
      state.down = state.sort === by ? !state.down : !!DOWN[by];
      state.sort = by;
      change();
    });
  });
  $("clear").addEventListener("click", function () { state.q = box.value = ""; state.chosen = {}; change(); box.focus(); });
  document.addEventListener("keydown", function (event) {
    if (event.key === "/" && !event.ctrlKey && !event.metaKey && !event.altKey && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      box.focus();
      box.select();
    } else if (event.key === "Escape" && document.activeElement === box && box.value) {
      state.q = box.value = "";
      change(true);
    }
  });
  function restore() {
    if (location.hash === "#main") { // the link that skips to the content: the state stays
      history.replaceState(null, "", "#" + written());
      return;
    }
    state = read();
    box.value = state.q;
    typing = false;
    show();
  }
  window.addEventListener("popstate", restore);
  if (window.matchMedia("(max-width: 56rem)").matches) $("filters").open = false;
  box.value = state.q;
  show();
  document.documentElement.classList.add("ready");
})();
