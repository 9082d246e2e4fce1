/* Search over the catalogue: MiniSearch with field weights, prefixes, typing errors, and the field's synonyms. */
(function () {
  "use strict";
  var FIELDS = {name: 6, title: 5, aliases: 5, idea: 3, phrases: 3, contribution: 2, tags: 2, claim: 1, mechanism: 0.6};
  var SYNONYM = 0.35; // weight of a word that was not typed
  var WEAK = 0.06; // results below this share of the best one are left out
  var SILENT = new Set(("a an and are as at by do does for from how i in into is it its of on or that the their them to " +
    "what when where which who with").split(" "));

  function stem(word) {
    if (word.length > 4 && word.endsWith("ies")) return word.slice(0, -3) + "y";
    if (word.length > 3 && word.endsWith("s") && !/(ss|us|is)$/.test(word)) return word.slice(0, -1);
    return word;
  }

  function term(word) {
    var plain = word.toLowerCase().normalize("NFKD").replace(/[\u0300-\u036f]/g, "");
    return SILENT.has(plain) ? null : stem(plain);
  }

  function terms(text) {
    return text.split(/[^\p{L}\p{N}]+/u).map(function (w) { return w ? term(w) : null; }).filter(Boolean);
  }

  /* Words that the synonyms add to a query. */
  function expand(query, groups) {
    var typed = terms(query), said = " " + typed.join(" ") + " ", extra = new Set();
    groups.forEach(function (group) {
      var has = group.filter(function (w) { var t = terms(w); return t.length && said.includes(" " + t.join(" ") + " "); });
      if (!has.length) return;
      group.forEach(function (w) {
        if (has.includes(w)) return;
        terms(w).forEach(function (t) { if (!typed.includes(t)) extra.add(t); });
      });
    });
    return Array.from(extra);
  }

  function create(data) {
    var index = new MiniSearch({
      idField: "key",
      fields: Object.keys(FIELDS),
      tokenize: function (text) { return text.split(/[^\p{L}\p{N}]+/u); },
      processTerm: term
    });
    index.addAll(data.papers);

    /* [{key, score}], best first; null for a query without words. */
    return function search(query) {
      var typed = terms(query);
      if (!typed.length) return null;
      var extra = expand(query, data.synonyms);
      var wanted = new Set(typed);
      var found = index.search(typed.concat(extra).join(" "), {
        boost: FIELDS,
        prefix: function (t) { return wanted.has(t) && t.length > 2; },
        fuzzy: function (t) { return wanted.has(t) && t.length > 3 ? 0.2 : false; },
        weights: {fuzzy: 0.3, prefix: 0.5},
        boostTerm: function (t) { return wanted.has(t) ? 1 : SYNONYM; }
      });
      var plain = query.trim().toLowerCase();
      found = found.map(function (hit) {
        var typedHits = hit.queryTerms.filter(function (t) { return wanted.has(t); });
        var share = new Set(typedHits).size / wanted.size;
        return {key: hit.id, score: hit.score * (0.15 + share * share)};
      });
      data.papers.forEach(function (paper) { // what is typed in full comes first
        if (paper.key === plain || paper.name.toLowerCase() === plain || paper.title.toLowerCase() === plain) {
          found = found.filter(function (hit) { return hit.key !== paper.key; });
          found.push({key: paper.key, score: Infinity});
        }
      });
      found.sort(function (a, b) { return b.score - a.score || (a.key < b.key ? -1 : 1); });
      var best = found.find(function (hit) { return hit.score !== Infinity; });
      return found.filter(function (hit) { return hit.score >= WEAK * best.score; });
    };
  }

  window.foveateSearch = create;
})();
