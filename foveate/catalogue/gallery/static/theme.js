/* Colours before the first paint, and the button that changes them: as the system has them, light, dark. */
(function () {
  "use strict";
  var root = document.documentElement;
  var names = ["auto", "light", "dark"];
  var spoken = {auto: "auto, as the system has them", light: "light", dark: "dark"};
  var theme = "auto";
  root.classList.add("js");
  try {
    theme = localStorage.getItem("foveate-theme") || "auto";
  } catch (error) {
    theme = "auto"; // no storage for files in this browser: the choice lasts as long as the page
  }
  if (names.indexOf(theme) < 0) theme = "auto";
  apply();

  function apply() {
    if (theme === "auto") root.removeAttribute("data-theme");
    else root.setAttribute("data-theme", theme);
  }

  document.addEventListener("DOMContentLoaded", function () {
    var button = document.getElementById("theme");
    function say() {
      button.setAttribute("aria-label", "Colours: " + spoken[theme]);
      button.querySelector(".theme-name").textContent = theme;
    }
    say();
    button.addEventListener("click", function () {
      theme = names[(names.indexOf(theme) + 1) % names.length];
      try {
        localStorage.setItem("foveate-theme", theme);
      } catch (error) {
        // as above
      }
      apply();
      say();
      document.dispatchEvent(new CustomEvent("foveate-theme"));
    });
  });
})();
