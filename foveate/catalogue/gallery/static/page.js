/* A paper's page: the way back to the search it came from, copy buttons, and tips that Escape closes. */
(function () {
  "use strict";
  var given = /^#back=(.*)$/.exec(location.hash);
  if (given) {
    var state = "";
    try {
      state = decodeURIComponent(given[1]);
    } catch (error) {
      state = ""; // a broken address leads back to the whole index
    }
    if (state) {
      document.getElementById("back").setAttribute("href", "../index.html#" + state);
      document.querySelector("#back span").textContent = described(state);
      document.querySelectorAll("a.keep").forEach(function (a) {
        a.setAttribute("href", a.getAttribute("href") + "#back=" + encodeURIComponent(state));
      });
    }
  }

  function described(text) {
    var q = /(?:^|&)q=([^&]*)/.exec(text);
    try {
      return q ? "results for “" + decodeURIComponent(q[1]) + "”" : "back to the selection";
    } catch (error) {
      return "back to the selection";
    }
  }

  document.querySelectorAll(".code").forEach(function (block) {
    var button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "copy";
    button.addEventListener("click", function () {
      copy(block.querySelector("code").textContent).then(function (done) {
        button.textContent = done ? "copied" : "press Ctrl+C";
        setTimeout(function () { button.textContent = "copy"; }, 2000);
      });
      if (button.textContent === "copy") button.textContent = "…";
    });
    button.setAttribute("aria-live", "polite");
    block.appendChild(button);

    function copy(text) {
      if (navigator.clipboard && window.isSecureContext) {
        return navigator.clipboard.writeText(text).then(function () { return true; }, function () { return select(); });
      }
      return Promise.resolve(select());
    }
    function select() {
      var range = document.createRange();
      range.selectNodeContents(block.querySelector("code"));
      var selection = window.getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      try {
        return document.execCommand("copy");
      } catch (error) {
        return false;
      }
    }
  });

  document.addEventListener("keydown", function (event) {
    if (event.key === "Escape") {
      document.querySelectorAll(".chips li").forEach(function (li) {
        if (li.matches(":hover, :focus-within")) li.classList.add("dismissed");
      });
    }
  });
  document.querySelectorAll(".chips li").forEach(function (li) {
    ["mouseleave", "focusout"].forEach(function (name) {
      li.addEventListener(name, function () { li.classList.remove("dismissed"); });
    });
  });
})();
