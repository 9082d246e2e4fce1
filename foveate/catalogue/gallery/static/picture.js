/* The picture of a mechanism: point at a query and see its keys; move the controls and see it change. */
(function () {
  "use strict";
  var picture = window.foveatePicture;
  var figure = document.getElementById("figure");
  if (!picture || !figure) return;
  var GAP = 0.12; // share of a cell left open, where cells are large enough to show it
  var says = figure.querySelector(".says"), panels = figure.querySelector(".panels"), box = figure.querySelector(".controls");
  var code = figure.querySelector(".frame-code code");
  var pairs = picture.kind === "pairs";
  var query = null, spot = null; // what is looked at: a query; in a map, also a column

  /* ---------------------------------------------------------------- frames */
  var chosen = (picture.controls || []).map(function (c) { return numeric(c) ? Math.floor((c.values.length - 1) / 2) : 0; });
  var unpacked = new Map();

  function frame() {
    return picture.frames.find(function (f) {
      return picture.controls.every(function (c, i) { return same(f.setting[c.name], c.values[chosen[i]]); });
    });
  }

  function numeric(control) {
    return control.values.every(function (v) { return typeof v === "number"; });
  }

  function same(a, b) { // values may be lists
    return JSON.stringify(a) === JSON.stringify(b);
  }

  function bytes(text) {
    return Uint8Array.from(atob(text), function (c) { return c.charCodeAt(0); });
  }

  var levels = pairs ? null : bytes(picture.levels);
  function cells() { // {rows, columns, at(row, column) -> 0..1}
    if (!pairs) {
      var m = picture.shape[1];
      return {rows: picture.shape[0], columns: m, at: function (i, j) { return levels[i * m + j] / 255; }};
    }
    var f = frame();
    if (!unpacked.has(f)) unpacked.set(f, bytes(f.bits));
    var bits = unpacked.get(f);
    return {rows: f.queries, columns: f.keys, at: function (i, j) { var n = i * f.keys + j; return bits[n >> 3] >> (n & 7) & 1; }};
  }

  /* ---------------------------------------------------------------- words */
  function runs(list) { // 3, 4, 5, 9 -> "3–5, 9"
    var parts = [];
    for (var i = 0; i < list.length; i++) {
      var start = list[i];
      while (list[i + 1] === list[i] + 1) i++;
      parts.push(start === list[i] ? String(start) : start + "–" + list[i]);
    }
    return parts.length > 8 ? parts.slice(0, 8).join(", ") + ", …" : parts.join(", ");
  }

  function keysOf(row) {
    var c = cells(), found = [];
    for (var j = 0; j < c.columns; j++) if (c.at(row, j)) found.push(j);
    return found;
  }

  function number(value) {
    return Number(value.toPrecision(3)).toString();
  }

  function sentence() {
    if (query === null) {
      return pairs ? "Point at a row, or use the arrow keys, to see the keys of a query." :
        "Point at a cell, or use the arrow keys, to read a weight.";
    }
    if (pairs) {
      var keys = keysOf(query);
      return "query " + query + " sees " + keys.length + (keys.length === 1 ? " key" : " keys") + (keys.length ? ": " + runs(keys) : "");
    }
    return picture.rows + " " + query + ", " + picture.columns + " " + spot + ": weight " + number(cells().at(query, spot) * picture.largest);
  }

  function summary() {
    if (!pairs) return "";
    var f = frame();
    return f.queries + " queries × " + f.keys + " keys, " + number(100 * f.density) + " % of the pairs are seen";
  }

  /* ---------------------------------------------------------------- drawing */
  function Panel(label, slider) {
    var made = document.createElement("div"), canvas = document.createElement("canvas"), name = document.createElement("p");
    made.className = "panel";
    name.className = "panel-name";
    name.textContent = label;
    canvas.tabIndex = slider ? 0 : -1;
    canvas.setAttribute("role", slider ? "slider" : "img");
    canvas.setAttribute("aria-label", slider ? (pairs ? "query" : "cell of the map") : label);
    if (slider) canvas.setAttribute("aria-orientation", "vertical");
    made.appendChild(name);
    made.appendChild(canvas);
    panels.appendChild(made);
    this.canvas = canvas;
    this.name = name;
  }

  /* Paint rows x columns cells; colour(i, j) -> [style, opacity] or null. */
  Panel.prototype.paint = function (rows, columns, colour, outline) {
    var canvas = this.canvas, ratio = window.devicePixelRatio || 1;
    var width = canvas.clientWidth || 320, height = width * rows / columns;
    if (height > 2 * width) height = 2 * width;
    canvas.style.aspectRatio = columns + " / " + rows;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    var g = canvas.getContext("2d"), w = canvas.width / columns, h = canvas.height / rows;
    var gap = Math.min(w, h) >= 4 * ratio ? GAP : 0;
    g.clearRect(0, 0, canvas.width, canvas.height);
    for (var i = 0; i < rows; i++) {
      for (var j = 0; j < columns; j++) {
        var c = colour(i, j);
        if (!c) continue;
        g.fillStyle = c[0];
        g.globalAlpha = c[1];
        var x = Math.round(j * w), y = Math.round(i * h), dx = Math.round(w * gap), dy = Math.round(h * gap);
        g.fillRect(x, y, Math.max(1, Math.round((j + 1) * w) - x - dx), Math.max(1, Math.round((i + 1) * h) - y - dy));
      }
    }
    g.globalAlpha = 1;
    (outline || []).forEach(function (o) {
      g.strokeStyle = o.style;
      g.lineWidth = 1.6 * ratio;
      g.strokeRect(o.column * w - 0.5, o.row * h - 0.5, o.columns * w, o.rows * h);
    });
  };

  /* (row, column) under the pointer. */
  Panel.prototype.under = function (event, rows, columns) {
    var r = this.canvas.getBoundingClientRect();
    var i = Math.floor((event.clientY - r.top) / r.height * rows), j = Math.floor((event.clientX - r.left) / r.width * columns);
    return [Math.max(0, Math.min(rows - 1, i)), Math.max(0, Math.min(columns - 1, j))];
  };

  panels.textContent = "";
  var matrix = new Panel(pairs ? "queries ↓ keys →" : picture.rows + " ↓ " + picture.columns + " →, shade: square root of the weight", true);
  var plane = pairs && picture.grid ? new Panel("the keys of one query on the " + picture.grid.join(" × ") + " grid", false) : null;
  figure.classList.add("live");
  if (plane) figure.classList.add("two");

  function draw() {
    var style = getComputedStyle(figure), ink = style.getPropertyValue("--hue").trim(), mark = style.getPropertyValue("--mark").trim();
    var ground = style.getPropertyValue("--ink").trim(), c = cells();
    matrix.paint(c.rows, c.columns, function (i, j) {
      var v = c.at(i, j), mine = i === query;
      if (pairs) {
        if (mine) return v ? [mark, 1] : [ground, 0.12];
        return v ? [ink, query === null ? 0.9 : 0.4] : [ground, 0.05];
      }
      return v ? [ink, Math.sqrt(v)] : [ground, 0.04];
    }, query === null ? [] : [pairs ? {row: query, column: 0, rows: 1, columns: c.columns, style: mark} :
      {row: query, column: spot, rows: 1, columns: 1, style: mark}]);
    if (plane) {
      var h = picture.grid[0], w = picture.grid[1], at = query === null ? middle() : query;
      var square = c.rows === h * w;
      plane.paint(h, w, function (i, j) {
        return c.at(at, i * w + j) ? [mark, 0.95] : [ground, 0.08];
      }, square ? [{row: Math.floor(at / w), column: at % w, rows: 1, columns: 1, style: ground}] : []);
      plane.canvas.setAttribute("aria-label", "The keys of query " + at + " on the grid: " + keysOf(at).length + " of " + c.columns);
      plane.name.textContent = "the keys of query " + at + " on the " + h + " × " + w + " grid";
    }
    says.textContent = sentence();
    var now = query === null ? 0 : query;
    matrix.canvas.setAttribute("aria-valuemin", 0);
    matrix.canvas.setAttribute("aria-valuemax", c.rows - 1);
    matrix.canvas.setAttribute("aria-valuenow", now);
    matrix.canvas.setAttribute("aria-valuetext", query === null ? "none chosen" : sentence());
    if (pairs) {
      code.textContent = frame().code;
      figure.querySelector("figcaption").textContent = picture.caption + (/[.!?]$/.test(picture.caption) ? " " : ". ") + summary() + ".";
    }
  }

  function middle() {
    var c = cells();
    return plane && c.rows === picture.grid[0] * picture.grid[1] ?
      Math.floor(picture.grid[0] / 2) * picture.grid[1] + Math.floor(picture.grid[1] / 2) : Math.floor(c.rows / 2);
  }

  /* ---------------------------------------------------------------- pointing */
  function look(row, column) {
    query = row;
    spot = row === null ? null : column === undefined ? spot || 0 : column;
    draw();
  }

  ["pointermove", "pointerdown"].forEach(function (name) {
    matrix.canvas.addEventListener(name, function (event) {
      var c = cells(), at = matrix.under(event, c.rows, c.columns);
      if (at[0] !== query || at[1] !== spot) look(at[0], at[1]);
    });
    if (plane) {
      plane.canvas.addEventListener(name, function (event) {
        var h = picture.grid[0], w = picture.grid[1];
        if (cells().rows !== h * w) return;
        var at = plane.under(event, h, w), row = at[0] * w + at[1];
        if (row !== query) look(row);
      });
    }
  });
  matrix.canvas.addEventListener("focus", function () { if (query === null) look(middle(), 0); });
  matrix.canvas.addEventListener("keydown", function (event) {
    var c = cells(), row = query === null ? middle() : query, column = spot || 0, far = Math.max(1, Math.round(c.rows / 8));
    var steps = {ArrowDown: [1, 0], ArrowUp: [-1, 0], PageDown: [far, 0], PageUp: [-far, 0], Home: [-row, 0], End: [c.rows, 0],
      ArrowRight: pairs ? [1, 0] : [0, 1], ArrowLeft: pairs ? [-1, 0] : [0, -1]};
    if (event.key === "Escape") { look(null); return; }
    var step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    look(Math.max(0, Math.min(c.rows - 1, row + step[0])), Math.max(0, Math.min(c.columns - 1, column + step[1])));
  });

  /* ---------------------------------------------------------------- controls */
  (picture.controls || []).forEach(function (control, n) {
    if (control.values.length < 2) return;
    var label = document.createElement("label"), name = document.createElement("span"), id = "control-" + n, field, shown;
    label.className = "control";
    label.htmlFor = id;
    name.textContent = control.name;
    label.appendChild(name);
    if (numeric(control)) {
      field = document.createElement("input");
      field.type = "range";
      field.min = 0;
      field.max = control.values.length - 1;
      field.step = 1;
      shown = document.createElement("output");
      shown.htmlFor = id;
    } else {
      field = document.createElement("select");
      control.values.forEach(function (value, i) {
        var option = document.createElement("option");
        option.value = i;
        option.textContent = value === true ? "on" : value === false ? "off" : String(value);
        field.appendChild(option);
      });
    }
    field.id = id;
    field.value = chosen[n];
    label.appendChild(field);
    if (shown) label.appendChild(shown);
    box.appendChild(label);
    function say() {
      if (!shown) return;
      shown.textContent = control.values[chosen[n]];
      field.setAttribute("aria-valuetext", control.name + " " + control.values[chosen[n]]);
    }
    say();
    field.addEventListener("input", function () {
      chosen[n] = Number(field.value);
      var rows = cells().rows;
      if (query !== null && query >= rows) query = rows - 1;
      say();
      draw();
    });
  });
  box.hidden = !box.children.length;

  document.addEventListener("foveate-theme", draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  var wide = 0;
  if (window.ResizeObserver) {
    new ResizeObserver(function () {
      if (panels.clientWidth !== wide) { // the height follows from the drawing
        wide = panels.clientWidth;
        requestAnimationFrame(draw);
      }
    }).observe(panels);
  }
  draw();
})();
